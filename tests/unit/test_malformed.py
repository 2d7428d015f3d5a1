"""Bytes that are no message of a call are the caller's fault."""

import grpc
import pytest

from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import generation_service_pb2 as pb
from tests.gateway import TakingTurns, gateway
from tests.tiny import tiny_config

GARBAGE = b"\xff\xff\xff\xff"


OPEN = pb.GenerateRequest(open=pb.OpenGenerate()).SerializeToString()


@pytest.mark.parametrize("messages", [[GARBAGE], [OPEN, GARBAGE]], ids=["first", "behind another"])
async def test_garbage_on_a_stream_is_an_invalid_argument(messages: list[bytes]) -> None:
    """Bug: it was answered INTERNAL, as if the server had a defect."""
    async with gateway(tiny_config(), TakingTurns([""])) as address, open_channel(address, Security()) as channel:
        call = channel.stream_stream("/colm.wire.v1.GenerationService/Generate")(iter(messages), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as refusal, Outcome(call).statuses():
            await call.read()
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "are not a message" in str(refusal.value.details())


async def test_garbage_in_a_single_message_is_an_invalid_argument() -> None:
    async with gateway(tiny_config(), TakingTurns([""])) as address, open_channel(address, Security()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await channel.unary_unary("/colm.wire.v1.GenerationService/GetClusterStatus")(GARBAGE, timeout=30)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "are not a message" in str(refusal.value.details())
