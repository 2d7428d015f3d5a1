"""What channels, servers and calls do, held against the gRPC that is installed."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from colm.errors import ColmError, LeaseExpired
from colm.wire.endpoint import KEEPALIVE, bind, channel_options, create_server, open_channel, server_options
from colm.wire.outcome import Outcome
from colm.wire.security import Security, Tls
from colm.wire.status import abort
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import (
    DecodeServiceServicer,
    DecodeServiceStub,
    add_DecodeServiceServicer_to_server,
)

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


class Refuser(DecodeServiceServicer):
    """Ends a call as soon as it has begun."""

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: grpc.aio.ServicerContext
    ) -> None:
        await anext(aiter(request_iterator))
        await abort(context, LeaseExpired("come again"))


async def test_a_refusal_in_the_middle_of_an_upload_arrives_as_itself() -> None:
    """Half of them arrived as "INTERNAL: Internal error from Core", whatever the server had said."""
    server = create_server(Security())
    add_DecodeServiceServicer_to_server(Refuser(), server)
    port = bind(server, "127.0.0.1", 0, Security())
    await server.start()
    errors = []
    try:
        for number in range(40):
            async with open_channel(f"127.0.0.1:{port}", Security()) as channel:
                call = DecodeServiceStub(channel).Decode(iter([pb.DecodeRequest()] * (1 + number % 8)))
                with pytest.raises(ColmError) as caught, Outcome(call).errors("server"):
                    await call.read()
                errors.append(caught.value)
    finally:
        await server.stop(None)
    assert {(type(error), str(error)) for error in errors} == {(LeaseExpired, "come again")}
