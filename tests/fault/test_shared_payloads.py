"""Payloads through shared memory: the answer is the oracle's whatever happens to them, and no memory stays open."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.errors import InvalidRequest
from colm.kv import KvFormat
from colm.wire import shared_memory
from colm.wire.endpoint import open_blocking_channel
from colm.wire.security import Security
from colm.wire.shared_memory import SharedMemory, Slot, host_id
from colm.wire.status import error_of
from colm.wire.tile_codec import decode_message, pull_kv_stub
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node import kv_receiver
from decode_node import node as decode_node_module
from prefill_node import encoded_tile, job_stream, quantum, service
from prefill_node.encoded_tile import EncodedTile
from prefill_node.engine import PrefillEngine
from prefill_node.job_stream import JobStream
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S, gate_before
from tests.memories import open_memories
from tests.nodes import TILE_TOKENS, Answer, Spoil, decode, decode_node, prefill_node, pull_kv_requests, spoilt_prefill
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
NUM_TILES = 10  # two layers of five


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def of_any_length(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short prompts share memory too; and at the end of a test nothing is open."""
    monkeypatch.setattr(service, "_WORTH_SHARING_BYTES", 0)
    monkeypatch.setattr(quantum, "QUANTUM_S", 0.0)  # the first step knows of no memory, every other one does
    monkeypatch.setattr(job_stream, "MAX_SHARED_TILES", 1)  # else it is chance which of them share a message
    yield
    assert not open_memories()


@asynccontextmanager
async def nodes(
    checkpoint: Checkpoint, spoil: Spoil = lambda _, __, data: [data]
) -> AsyncIterator[Callable[[], "asyncio.Task[Answer]"]]:
    """A prefill and a decode node with a line between them; decodes the prompt, and computes once memory is shared."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path, shared_memory="auto") as prefill,
        spoilt_prefill(prefill.address, spoil) as address,
        decode_node(path, [address]) as node,
    ):
        with gate_before(PrefillEngine, "step") as gate:

            async def answer() -> Answer:
                answering = asyncio.create_task(decode(node.address, PROMPT, num_chains=3))
                await until_answered(prefill)
                gate.open()
                return await answering

            yield lambda: asyncio.create_task(answer())


async def until_answered(prefill: PrefillNode) -> None:
    """Wait until the reader of the node's one job reads shared memory."""
    async with asyncio.timeout(LIMIT_S):
        while not any(job.read_memory for job in prefill.service._loop._jobs.values()):
            await asyncio.sleep(0.005)


def kv_bytes(checkpoint: Checkpoint) -> int:
    return (len(PROMPT) - 1) * KvFormat.of(checkpoint.config, torch.float32).token_bytes


def assert_right(checkpoint: Checkpoint, answer: Answer, *, num_streams: int = 1) -> None:
    assert answer.usage.num_kv_streams == num_streams
    assert answer.usage.kv_received_bytes == kv_bytes(checkpoint)
    assert answer.usage.num_decode_prompt_tokens == 1
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


async def test_payloads_go_through_memory_and_headers_over_the_stream(checkpoint: Checkpoint) -> None:
    on_stream = 0

    def count(_: int, __: int, data: bytes) -> list[bytes]:
        nonlocal on_stream
        on_stream += len(decode_message(data)[1])
        return [data]

    async with nodes(checkpoint, count) as ask:
        answer = await ask()
    assert_right(checkpoint, answer)
    assert on_stream == TILE_TOKENS * KvFormat.of(checkpoint.config, torch.float32).layer_token_bytes
    assert answer.usage.kv_shared_bytes == kv_bytes(checkpoint) - on_stream


def once(kind: str, number: int, change: Callable[[pb.PullKvResponse], None]) -> Spoil:
    """Change one message of a kind on the first attempt."""
    seen = 0

    def spoil(attempt: int, _: int, data: bytes) -> list[bytes]:
        nonlocal seen
        header, payload = decode_message(data)
        if attempt == 1 and header.WhichOneof("event") == kind:
            seen += 1
            if seen == number:
                change(header)
                header.payload = bytes(payload)
                return [header.SerializeToString()]
        return [data]

    return spoil


def place_at(**fields: int) -> Callable[[pb.PullKvResponse], None]:
    def change(header: pb.PullKvResponse) -> None:
        for name, value in fields.items():
            setattr(header.tile.shared, name, value)

    return change


def both_ways(header: pb.PullKvResponse) -> None:
    header.tile.shared.num_bytes = header.tile.shared.num_bytes
    header.payload = b"x"


FAULTS: dict[str, Spoil] = {
    "an offset outside": once("tile", 3, place_at(offset_bytes=1 << 40)),
    "an offset of the key": once("tile", 3, place_at(offset_bytes=0)),
    "another offset": once("tile", 3, place_at(offset_bytes=4096 + 8)),
    "a length outside": once("tile", 3, place_at(num_bytes=1 << 62)),
    "a shorter length": once("tile", 3, place_at(num_bytes=8)),
    "no length": once("tile", 3, place_at(num_bytes=0)),
    "another checksum": once("tile", 3, lambda header: setattr(header.tile, "checksum", 1)),
    "no place": once("tile", 3, lambda header: header.tile.ClearField("shared")),
    "other counts at the end": once("complete", 1, lambda header: setattr(header.complete, "shared_bytes", 1)),
    "connection lost in the middle": lambda attempt, number, data: None if (attempt, number) == (1, 5) else [data],
    "a tile twice": lambda attempt, number, data: [data] * (1 + ((attempt, number) == (1, 5))),
    "a tile lost": lambda attempt, number, data: [data] * ((attempt, number) != (1, 5)),
    "offered twice": lambda attempt, number, data: [data] * (1 + ((attempt, number) == (1, 1))),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_spoilt_stream_is_fetched_again_and_the_answer_is_the_oracles(
    checkpoint: Checkpoint, fault: str
) -> None:
    """From the window, whose payloads lie where they were; or, had they been stored, nothing at all."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path, shared_memory="auto") as prefill,
        spoilt_prefill(prefill.address, FAULTS[fault]) as address,
        decode_node(path, [address]) as node,
    ):
        with gate_before(PrefillEngine, "step") as gate:
            answering = asyncio.create_task(decode(node.address, PROMPT, num_chains=3))
            if fault != "offered twice":
                await until_answered(prefill)
            gate.open()
            answer = await answering
    assert_right(checkpoint, answer, num_streams=2)


async def test_a_bit_that_flips_in_memory_is_found_and_the_tile_made_anew(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the window is wrong for good then, so the node refuses to send it and computes the prompt again."""
    encode, num_encoded = encoded_tile.encode_tile, 0

    def flip(*args: Any, slot: Slot | None, **kwargs: Any) -> bytes:
        nonlocal num_encoded
        message = encode(*args, slot=slot, **kwargs)
        num_encoded += 1
        if num_encoded == 4:
            assert slot is not None
            slot.payload[7] ^= 1
        return message

    monkeypatch.setattr(encoded_tile, "encode_tile", flip)
    async with nodes(checkpoint) as ask:
        answer = await ask()
    assert_right(checkpoint, answer, num_streams=3)


async def refused(checkpoint: Checkpoint) -> Answer:
    """An answer of nodes that share nothing."""
    path = str(checkpoint.path)
    async with prefill_node(path, shared_memory="auto") as prefill, decode_node(path, [prefill.address]) as node:
        return await decode(node.address, PROMPT, num_chains=3)


def no_memory(*_: object) -> int:
    raise OSError("no memory for anybody")


FALLBACKS: dict[str, tuple[Any, str, Any]] = {
    "another host": (decode_node_module, "host_id", lambda: "another"),
    "a reader that shares nothing": (decode_node_module, "host_id", lambda: ""),
    "the reader cannot open it": (kv_receiver, "SharedReader", no_memory),
    "the writer gets none": (shared_memory.os, "memfd_create", no_memory),
    "no room in it": (SharedMemory, "take", lambda *_: None),
}


def once_among_several(number: int, **fields: int) -> Spoil:
    """Change one tile of the first message that has several."""

    def change(header: pb.PullKvResponse) -> None:
        for name, value in fields.items():
            setattr(header.shared_tiles.tiles[number], name, value)

    return once("shared_tiles", 1, change)


SEVERAL: dict[str, tuple[Spoil, int]] = {
    "as they are": (lambda _, __, data: [data], 1),
    "one damaged": (once_among_several(5, num_tokens=1), 2),
    "one out of turn": (once("shared_tiles", 1, lambda header: header.shared_tiles.tiles.pop(3)), 2),
    "all twice": (lambda attempt, number, data: [data] * (1 + ((attempt, number) == (1, 3))), 2),
    "lost": (lambda attempt, number, data: [data] * ((attempt, number) != (1, 3)), 2),
}


@pytest.mark.parametrize("case", SEVERAL)
async def test_tiles_that_wait_share_a_message_and_any_of_them_may_be_spoilt(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The stream takes nothing before all is computed: one tile with its payload, then eight and one of memory."""
    spoil, num_streams = SEVERAL[case]
    monkeypatch.setattr(job_stream, "MAX_SHARED_TILES", 8)
    take, nums_tiles = JobStream.take, []

    def late(stream: JobStream) -> EncodedTile | None:
        return take(stream) if stream.job.is_computed else None

    def count(attempt: int, number: int, data: bytes) -> list[bytes]:
        header, _ = decode_message(data)
        if attempt == 1 and (header.HasField("tile") or header.HasField("shared_tiles")):
            nums_tiles.append(len(header.shared_tiles.tiles) or 1)
        return spoil(attempt, number, data)

    monkeypatch.setattr(JobStream, "take", late)
    async with nodes(checkpoint, count) as ask:
        answer = await ask()
    assert_right(checkpoint, answer, num_streams=num_streams)
    assert nums_tiles[:2] == [1, 8]


@pytest.mark.parametrize("case", FALLBACKS)
async def test_without_shared_memory_everything_goes_over_the_one_stream(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(*FALLBACKS[case])
    answer = await refused(checkpoint)
    assert_right(checkpoint, answer)
    assert answer.usage.kv_shared_bytes == 0


async def test_a_full_memory_sends_the_rest_over_the_stream(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, num_taken = SharedMemory.take, 0

    def few(memory: SharedMemory, num_bytes: int) -> Slot | None:
        nonlocal num_taken
        num_taken += 1
        return take(memory, num_bytes) if num_taken % 2 else None

    monkeypatch.setattr(SharedMemory, "take", few)
    async with nodes(checkpoint) as ask:
        answer = await ask()
    assert_right(checkpoint, answer)
    assert 0 < answer.usage.kv_shared_bytes < kv_bytes(checkpoint)


async def test_another_node_takes_over_from_one_whose_memory_was_read(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(prefill_node(path, shared_memory="auto")) for _ in range(2)]
        dying = await stack.enter_async_context(
            spoilt_prefill(first.address, lambda _, number, data: [data] if number < 5 else None)
        )
        node = await stack.enter_async_context(decode_node(path, [dying, second.address]))
        with gate_before(PrefillEngine, "step") as gate:
            answering = asyncio.create_task(decode(node.address, PROMPT, num_chains=3))
            await until_answered(first)
            gate.open()
            answer = await answering
    assert answer.usage.kv_received_bytes == kv_bytes(checkpoint)
    assert answer.usage.kv_shared_bytes > 0
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


@pytest.mark.parametrize("is_mapped", [True, False])
async def test_an_answer_that_nobody_asked_for_is_refused(checkpoint: Checkpoint, is_mapped: bool) -> None:
    async with prefill_node(str(checkpoint.path), shared_memory="auto") as prefill:
        answer = pb.PullKvRequest(shared_memory=pb.SharedMemoryAnswer(is_mapped=is_mapped))
        with open_blocking_channel(prefill.address, Security()) as channel, gate_before(PrefillEngine, "step"):
            call = pull_kv_stub(channel)(iter([*pull_kv_requests(prefill, PROMPT, host_id="another"), answer]))
            with pytest.raises(Exception) as caught:  # noqa: PT011 - looked at below
                await asyncio.to_thread(list, call)
        error = error_of(caught.value, "prefill node")
    assert isinstance(error, InvalidRequest)
    assert "answers an event that has not come" in str(error)


async def test_a_reader_that_cancels_leaves_no_memory(checkpoint: Checkpoint) -> None:
    async with nodes(checkpoint) as ask:
        asking = ask()
        async with asyncio.timeout(LIMIT_S):
            while not open_memories():
                await asyncio.sleep(0.005)
        asking.cancel()


async def test_memory_is_offered_to_the_same_host_alone(checkpoint: Checkpoint) -> None:
    async with prefill_node(str(checkpoint.path), shared_memory="auto") as prefill:
        for host, is_offered in ((host_id(), True), ("another", False), ("", False)):
            with open_blocking_channel(prefill.address, Security()) as channel:
                asked = pull_kv_requests(prefill, PROMPT, transfer_id=f"of {host}", host_id=host)
                messages = await asyncio.to_thread(list, pull_kv_stub(channel)(iter(asked)))
            headers = [decode_message(data)[0] for data in messages]
            offers = [header for header in headers if header.WhichOneof("event") == "shared_memory"]
            assert bool(offers) == is_offered
            # Nobody has answered.
            assert not any(header.tile.HasField("shared") for header in headers)
