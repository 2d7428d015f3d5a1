"""What channels and servers are opened with, held against the gRPC that is installed."""

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from colm.wire.endpoint import KEEPALIVE, channel_options, server_options
from colm.wire.security import Security, Tls

OPTIONS = {
    "server": server_options(),
    "channel": channel_options(Security(tls=Tls(ca_pem=b"", server_name="colm-serve"))),
}


@pytest.mark.parametrize("side", OPTIONS)
def test_every_option_is_one_that_grpc_knows(side: str) -> None:
    """gRPC takes an unknown option without a word: one of ours was misspelt, and silent calls died after 40 s."""
    known = Path(cygrpc.__file__).read_bytes()
    names = [name for name, _ in OPTIONS[side]]
    assert [name for name in names if name.encode() + b"\0" not in known] == []
    assert len(names) == len(set(names))


def test_a_server_bears_its_clients_pings() -> None:
    assert dict(server_options())["grpc.http2.min_ping_interval_without_data_ms"] < KEEPALIVE.interval_ms
