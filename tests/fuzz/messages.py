"""Damaged messages to all three services, which run in this process over real sockets."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from colm.errors import DeadlineExceeded, PeerFailed
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import open_channel
from colm.wire.messages import sampling_to_pb
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import common_pb2, generation_service_pb2, kv_transfer_service_pb2
from tests import nodes
from tests.fuzz import mutations
from tests.fuzz.files import CONFIG
from tests.gateway import TakingTurns, gateway
from tests.tiny import tiny_checkpoint

_CALL_S = 30.0
_SERVICES = {
    "Generate": "GenerationService",
    "GetClusterStatus": "GenerationService",
    "Decode": "DecodeService",
    "PullKv": "KvTransferService",
}
_PROMPT = [5, 6, 7, 8, 9]


class Messages:
    """A gateway, a decode and a prefill node; each case is one call with damaged messages."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._num_calls = 0
        self._loop.run_until_complete(self._start(folder))
        for method in _SERVICES:
            self._loop.run_until_complete(self._call(method, [one.SerializeToString() for one in self._fresh(method)]))

    def run(self, rng: random.Random) -> None:
        """One call."""
        method = rng.choice(("Generate", "Generate", "Decode", "Decode", "PullKv", "PullKv", "GetClusterStatus"))
        self._loop.run_until_complete(self._call(method, self._damaged(rng, self._fresh(method))))

    def close(self) -> None:
        """Every request has been let go of, and an honest one is answered."""
        for method in _SERVICES:
            self._loop.run_until_complete(self._call(method, [one.SerializeToString() for one in self._fresh(method)]))
        self._loop.run_until_complete(self._stack.aclose())

    async def _start(self, folder: Path) -> None:
        checkpoint = tiny_checkpoint(folder / "colm", CONFIG, tokenizer=True)
        enter = self._stack.enter_async_context
        prefill = await enter(nodes.prefill_node(str(checkpoint.path)))
        decode = await enter(nodes.decode_node(str(checkpoint.path), [prefill.address]))
        pool = TakingTurns([decode.address])
        door = await enter(gateway(CONFIG, pool, Tokenizer.load(checkpoint), max_new_tokens=40))
        addresses = {"GenerationService": door, "DecodeService": decode.address, "KvTransferService": prefill.address}
        self._channels = {
            service: await enter(open_channel(address, Security())) for service, address in addresses.items()
        }
        kv = kv_transfer_service_pb2
        self._valid: dict[str, list[Message]] = {
            "Generate": _generate_requests(),
            "GetClusterStatus": [generation_service_pb2.GetClusterStatusRequest()],
            "Decode": list(nodes.decode_requests(_PROMPT, max_new_tokens=4)),
            "PullKv": [*nodes.pull_kv_requests(prefill, _PROMPT), kv.PullKvRequest(give_up=kv.GiveUp())],
        }

    async def _call(self, method: str, messages: list[bytes]) -> None:
        service = _SERVICES[method]
        path, channel = f"/colm.wire.v1.{service}/{method}", self._channels[service]
        try:
            if method == "GetClusterStatus":
                await channel.unary_unary(path)(messages[0] if messages else b"", timeout=_CALL_S)
                return
            call = channel.stream_stream(path)(_each(messages), timeout=_CALL_S)
            with Outcome(call).errors(service):
                async for _ in call:
                    pass
        except grpc.aio.AioRpcError as err:
            if err.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
        except (PeerFailed, DeadlineExceeded) as err:
            if isinstance(err, DeadlineExceeded) and "while waiting for" not in str(err):
                raise  # the deadline that the request itself named
            raise AssertionError(f"{service}.{method} ended without a typed error: {err}") from err

    def _fresh(self, method: str) -> list[Message]:
        """Copies of the messages of an honest call, under an id of its own."""
        messages = [type(one).FromString(one.SerializeToString()) for one in self._valid[method]]
        opened: Any = messages[0]
        self._num_calls += 1
        if method == "Decode":
            opened.open.request_id = f"case {self._num_calls}"
        elif method == "PullKv":
            opened.open.transfer_id = f"case {self._num_calls}"
        return messages

    def _damaged(self, rng: random.Random, messages: list[Message]) -> list[bytes]:
        for _ in range(rng.randint(0, 2)):
            change_field(rng, rng.choice(messages))
        written = [one.SerializeToString() for one in messages]
        at = rng.randrange(len(written))
        match rng.randrange(8):
            case 0:
                written[at] = mutations.data(rng, written[at])
            case 1:
                written[at] = rng.randbytes(rng.choice((0, 1, 8, 64, 4096)))
            case 2:
                del written[at]
            case 3:
                written.insert(at, written[rng.randrange(len(written))])
            case 4:
                rng.shuffle(written)
        return written


async def _each(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def _generate_requests() -> list[Message]:
    from colm.sampling import ANY_JSON_OBJECT, SamplingParams

    pb = generation_service_pb2
    sampling = SamplingParams(temperature=0.5, seed=1, logit_bias=((5, 1.0),), constraint=ANY_JSON_OBJECT)
    opened = pb.OpenGenerate(prompt="the end", chat=True, max_new_tokens=3, sampling=sampling_to_pb(sampling))
    return [
        pb.GenerateRequest(open=opened),
        pb.GenerateRequest(document=b"the"),
        pb.GenerateRequest(end_of_prompt=common_pb2.EndOfPrompt()),
    ]


def change_field(rng: random.Random, message: Message) -> None:
    """Give a field of a message, or of one inside it, a value that it rarely has."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    present = [field for field, _ in message.ListFields()]
    field = rng.choice(present if present and rng.random() < 0.8 else fields)
    if field.message_type is not None:
        inner = getattr(message, field.name)
        return change_field(rng, inner.add() if field.is_repeated else inner)
    drawn = _scalar(rng, field)
    try:
        if field.is_repeated:
            getattr(message, field.name).extend([drawn] * rng.choice((1, 2, 100)))
        else:
            setattr(message, field.name, drawn)
    except (TypeError, ValueError):
        message.ClearField(field.name)


def _scalar(rng: random.Random, field: Any) -> Any:
    text = rng.choice(("", "x", "\0", "é" * 1000, "a" * 100_000, "tiny"))
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            return rng.randbytes(rng.randrange(64)) if field.type == field.TYPE_BYTES else text
        case field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return rng.choice(mutations.FLOATS)
    return rng.choice((0, 1, 2, 63, 64, 65, 2**31 - 1, 2**32 - 1, 2**63 - 1, -1, int(np.int64(rng.getrandbits(8)))))
