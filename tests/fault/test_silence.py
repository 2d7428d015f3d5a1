"""Calls in which nothing is said for long, and peers that will never speak again."""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc
import pytest

from colm.wire import endpoint
from colm.wire.endpoint import Keepalive, bind, create_server
from colm.wire.security import Security
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server

# A twentieth of the real times: twelve pings, as 120 s of silence bring.
SCALED = Keepalive(interval_ms=500, timeout_ms=5_000)
SILENCE_S = 6.0

# A process of its own: other traffic on the same connection would hide the pings.
CALLER = """
import sys
from colm.wire import endpoint
from colm.wire.security import Security
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub

endpoint.KEEPALIVE = endpoint.Keepalive(interval_ms=int(sys.argv[2]))
with endpoint.open_blocking_channel(sys.argv[1], Security()) as channel:
    (answer,) = DecodeServiceStub(channel).Decode(iter([pb.DecodeRequest()]), timeout=200)
    print(answer.reserved.num_pages)
"""


class Silent(DecodeServiceServicer):
    """Thinks before it answers."""

    async def Decode(
        self,
        request_iterator: AsyncIterator[pb.DecodeRequest],  # noqa: ARG002
        context: grpc.aio.ServicerContext,
    ) -> None:
        await asyncio.sleep(SILENCE_S)
        await context.write(pb.DecodeResponse(reserved=pb.Reserved(num_pages=7)))


async def test_a_call_outlives_any_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server took keepalive pings for abuse and closed the connection at the fourth: "too many pings"."""
    monkeypatch.setattr(endpoint, "KEEPALIVE", SCALED)
    server = create_server(Security())
    add_DecodeServiceServicer_to_server(Silent(), server)
    port = bind(server, "127.0.0.1", 0, Security())
    await server.start()
    try:
        caller = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CALLER, f"127.0.0.1:{port}", str(SCALED.interval_ms)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        stdout, stderr = await caller.communicate()
    finally:
        await server.stop(None)
    assert stdout.decode().strip() == "7", stderr.decode()
