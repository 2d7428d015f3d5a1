"""A transfer whose stream broke goes on where it was: nothing is moved twice, and the answer is the oracle's."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.errors import InvalidRequest, PeerUnavailable
from colm.kv import KvFormat, KvTile
from colm.wire.tile_codec import decode_message
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from prefill_node import making as making_module
from prefill_node import prefill_job
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from tests.callers import Caller
from tests.gates import Gate, gate_before
from tests.nodes import decode, decode_node, prefill_node, spoilt_prefill
from tests.oracle import assert_greedy
from tests.relay import relay
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
NUM_TILES = 10  # two layers of five


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def token_bytes(checkpoint: Checkpoint) -> int:
    return KvFormat.of(checkpoint.config, torch.float32).token_bytes


@contextmanager
def counted_tiles(gate: Gate | None = None, num_before_gate: int = 0) -> Iterator[list[KvTile]]:
    """Every tile that any engine computes for a job; after so many it waits at the gate."""
    tiles: list[KvTile] = []
    keep = making_module.Making.keep

    def counting(making: making_module.Making, tile: KvTile) -> None:
        if gate is not None and len(tiles) == num_before_gate:
            gate.pass_through()
        tiles.append(tile)
        keep(making, tile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making_module.Making, "keep", counting)
        yield tiles


class Line:
    """What passes on a stream that breaks once: at a message of the first attempt."""

    def __init__(self, breaks_at: int) -> None:
        self._breaks_at = breaks_at
        self.moved_bytes = 0

    def __call__(self, attempt: int, number: int, data: bytes) -> list[bytes] | None:
        if (attempt, number) == (1, self._breaks_at):
            return None
        self.moved_bytes += len(decode_message(data)[1])
        return [data]


@pytest.mark.parametrize("at", [0, 1, 4, NUM_TILES, NUM_TILES + 1])
async def test_the_node_that_holds_the_job_goes_on_and_computes_nothing_twice(checkpoint: Checkpoint, at: int) -> None:
    """Bug: a broken connection cost the whole prefill again. The last case breaks before `complete`."""
    path, line = str(checkpoint.path), Line(at)
    with counted_tiles() as tiles:
        async with (
            prefill_node(path) as prefill,
            spoilt_prefill(prefill.address, line) as address,
            decode_node(path, [address]) as node,
        ):
            answer = await decode(node.address, PROMPT, num_chains=3)
    assert answer.usage.num_kv_streams == 2
    assert answer.usage.kv_received_bytes == line.moved_bytes == (len(PROMPT) - 1) * token_bytes(checkpoint)
    assert len(tiles) == NUM_TILES
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


@pytest.mark.parametrize("tile_tokens", [31, 20, 64])
async def test_another_node_computes_again_and_moves_only_what_is_missing(
    checkpoint: Checkpoint, tile_tokens: int
) -> None:
    """It may cut its tiles elsewhere than the first one did."""
    path = str(checkpoint.path)
    async with prefill_node(path) as first, prefill_node(path, tile_tokens=tile_tokens) as second:
        gone = asyncio.Event()

        def dies(_: int, number: int, data: bytes) -> list[bytes] | None:
            if number == 4:
                gone.set()
            return None if gone.is_set() else [data]

        async with (
            spoilt_prefill(first.address, dies) as dying,
            decode_node(path, [dying, second.address]) as node,
        ):
            answer = await decode(node.address, PROMPT, num_chains=3)
    assert answer.usage.num_kv_streams == 3  # the node that held the job is asked once more
    assert answer.usage.kv_received_bytes == (len(PROMPT) - 1) * token_bytes(checkpoint)
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


async def test_a_connection_that_is_lost_in_the_middle_is_made_again_and_goes_on(checkpoint: Checkpoint) -> None:
    path, gate = str(checkpoint.path), Gate()
    with counted_tiles(gate, 6) as tiles:
        async with (
            prefill_node(path) as prefill,
            relay(prefill.address) as line,
            decode_node(path, [line.address]) as node,
        ):
            answering = asyncio.create_task(decode(node.address, PROMPT, num_chains=3))
            await gate.until_reached()
            await line.vanish()
            await line.start()
            gate.open()
            answer = await answering
    assert line.num_accepted == 2
    assert answer.usage.num_kv_streams == 2
    assert answer.usage.kv_received_bytes == (len(PROMPT) - 1) * token_bytes(checkpoint)
    assert len(tiles) == NUM_TILES
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


async def test_a_node_that_has_forgotten_the_job_computes_again_and_moves_only_what_is_missing(
    checkpoint: Checkpoint,
) -> None:
    """As a restarted one has."""
    path, line = str(checkpoint.path), Line(6)
    with counted_tiles() as tiles:
        async with (
            prefill_node(path, job_lease_s=0.0) as prefill,
            spoilt_prefill(prefill.address, line) as address,
            decode_node(path, [address]) as node,
        ):
            answer = await decode(node.address, PROMPT, num_chains=3)
    assert answer.usage.kv_received_bytes == line.moved_bytes == (len(PROMPT) - 1) * token_bytes(checkpoint)
    assert len(tiles) > NUM_TILES
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


@pytest.fixture
async def node(checkpoint: Checkpoint) -> AsyncIterator[PrefillNode]:
    async with prefill_node(str(checkpoint.path)) as node:
        yield node


async def test_a_newer_stream_takes_over_and_the_older_one_ends_with_an_error(node: PrefillNode) -> None:
    older = Caller(node, PROMPT)
    begun = await older.read(3)
    newer = Caller(node, PROMPT, epoch=2, resume_from=pb.KvPosition(layer=0, token=62))
    assert isinstance(await older.error(), PeerUnavailable)
    rest = await newer.read(NUM_TILES)
    newer.acknowledge(2, 0)
    assert await newer.read() == []
    assert [message.WhichOneof("event") for message in begun] == ["started", "tile", "tile"]
    assert [message.WhichOneof("event") for message in rest] == ["started", *["tile"] * (NUM_TILES - 2), "complete"]
    assert (rest[1].tile.epoch, rest[1].tile.layer, rest[1].tile.first_token) == (2, 0, 62)
    assert rest[-1].complete.num_tiles == NUM_TILES - 2
    for caller in (older, newer):
        caller.close()


async def test_an_older_stream_that_comes_late_changes_nothing(node: PrefillNode) -> None:
    newer = Caller(node, PROMPT, epoch=2)
    await newer.read(3)
    late = Caller(node, PROMPT, epoch=1)
    error = await late.error()
    assert isinstance(error, PeerUnavailable)
    assert "in epoch 2 already, this is 1" in str(error)
    assert [message.WhichOneof("event") for message in await newer.read(NUM_TILES - 1)][-1] == "complete"
    for caller in (newer, late):
        caller.close()


BAD = {
    "beyond what was sent": (pb.PullKvRequest(acknowledged=pb.KvPosition(layer=9)), "acknowledged"),
    "another prompt": (pb.PullKvRequest(token_ids=common_pb2.TokenIds(ids=[1])), "part"),
    "nothing": (pb.PullKvRequest(), "part"),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_may_not_follow_the_prompt_is_refused_by_name(node: PrefillNode, case: str) -> None:
    request, field = BAD[case]
    with gate_before(PrefillEngine, "step") as gate:
        caller = Caller(node, PROMPT)
        await gate.until_reached()
        caller.say(request)
        error = await caller.error()
    assert isinstance(error, InvalidRequest)
    assert error.field == field
    caller.close()


@pytest.mark.parametrize(("layer", "token"), [(0, 150), (2, 1), (3, 0)])
async def test_a_position_outside_the_transfer_is_refused_by_name(node: PrefillNode, layer: int, token: int) -> None:
    caller = Caller(node, PROMPT, resume_from=pb.KvPosition(layer=layer, token=token))
    error = await caller.error()
    assert isinstance(error, InvalidRequest)
    assert error.field == "resume_from"
    caller.close()


async def test_a_caller_that_can_acknowledge_no_more_is_refused_when_the_window_is_full(
    node: PrefillNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for the rest for ever."""
    monkeypatch.setattr(prefill_job, "WINDOW_BYTES", 1)
    caller = Caller(node, PROMPT)
    caller.say(None)
    error = await caller.error()
    assert isinstance(error, InvalidRequest)
    assert "the caller closed its side" in error.limit
    caller.close()


async def test_a_transfer_that_is_given_up_is_forgotten_at_once(node: PrefillNode) -> None:
    """A lease is for streams that break: a cancelled request would hold the engine's memory, and its step go on."""
    with gate_before(PrefillEngine, "step") as gate:
        caller = Caller(node, PROMPT)
        await gate.until_reached()
        caller.say(pb.PullKvRequest(give_up=pb.GiveUp()))
        messages = await caller.read()
        assert [message.WhichOneof("event") for message in messages] == ["started"]
        assert not node.service._loop._jobs
    caller.close()
