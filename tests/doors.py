"""Servers that answer whoever is let in, and calls of each kind to them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from colm.clock import utc_now
from colm.wire.endpoint import bind, create_server, open_channel
from colm.wire.security import Security
from colm.wire.tile_codec import pull_kv_handlers
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1 import kv_transfer_service_pb2 as kv_pb
from colm.wire.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)
from colm.wire.v1.kv_transfer_service_pb2_grpc import KvTransferServiceStub
from tests.gates import LIMIT_S


class OpenDoor(GenerationServiceServicer):
    """Answers whoever gets this far."""

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], _: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        async for _ in request_iterator:
            yield pb.GenerateResponse()

    async def GetClusterStatus(
        self, _: pb.GetClusterStatusRequest, __: grpc.aio.ServicerContext
    ) -> pb.GetClusterStatusResponse:
        return pb.GetClusterStatusResponse(num_active_requests=1)


async def pull_kv(requests: AsyncIterator[kv_pb.PullKvRequest], _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    async for _ in requests:
        yield kv_pb.PullKvResponse().SerializeToString()


@asynccontextmanager
async def serving(security: Security, now: Callable[[], datetime] = utc_now) -> AsyncIterator[str]:
    """A server with one service of each kind, and its address."""
    server = create_server(security, now=now)
    add_GenerationServiceServicer_to_server(OpenDoor(), server)
    server.add_generic_rpc_handlers((pull_kv_handlers(pull_kv),))
    health = health_aio.HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = bind(server, "127.0.0.1", 0, security)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def ask_status(channel: grpc.aio.Channel, security: Security) -> int:
    call = GenerationServiceStub(channel).GetClusterStatus(
        pb.GetClusterStatusRequest(), metadata=security.metadata(), timeout=LIMIT_S
    )
    return int((await call).num_active_requests)


async def ask_stream(channel: grpc.aio.Channel, security: Security) -> int:
    call = GenerationServiceStub(channel).Generate(
        iter([pb.GenerateRequest()]), metadata=security.metadata(), timeout=LIMIT_S
    )
    return len([message async for message in call])


async def ask_tiles(channel: grpc.aio.Channel, security: Security) -> int:
    call = KvTransferServiceStub(channel).PullKv(
        iter([kv_pb.PullKvRequest()]), metadata=security.metadata(), timeout=LIMIT_S
    )
    return len([message async for message in call])


ASKS = pytest.mark.parametrize("ask", [ask_status, ask_stream, ask_tiles])


async def refusal(ask: Callable[..., object], address: str, security: Security) -> grpc.aio.AioRpcError:
    async with open_channel(address, security) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ask(channel, security)
    return raised.value
