"""A prompt's beginning comes up from a decode node to a prefill node that has none of it: what moves, and the bits."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.kv import KvFormat
from colm.retry import RetryPolicy
from colm.segmented_lru import SegmentedLru
from colm.wire import endpoint
from colm.wire.authority import Authority
from colm.wire.endpoint import Keepalive
from colm.wire.kv_codec import read_payload
from colm.wire.members import Member
from colm.wire.security import Security, new_tls
from colm.wire.tile_codec import encode_tile, seal
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node import node as node_module
from decode_node.node import DecodeNode
from decode_node.prefill_pool import StaticPrefillPool
from prefill_node import prefix_uplink
from prefill_node.node import PrefillNode
from prefill_node.prefix_uplink import PrefixUplinks, UplinkCounts
from tests.callers import Caller, pulled
from tests.gates import LIMIT_S, gate_before
from tests.nodes import PAGE_TOKENS, decode, decode_node, prefill_node, until_prefill_idle
from tests.relay import ByteFault, Mishap, relay
from tests.tiny import tiny_checkpoint

TILE_TOKENS = 2 * PAGE_TOKENS
"""So that a tile is a block."""
KEEPS = {"prefix_cache_bytes": 16 << 20}
DOCUMENT = torch.randint(0, 320, (3 * TILE_TOKENS + 5,), generator=torch.Generator().manual_seed(1)).tolist()
ONE, OTHER = [*DOCUMENT, 7, 8, 9], [*DOCUMENT, 17, 18, 19, 20, 21]
NUM_SHARED = 3 * TILE_TOKENS
NUM_REST = len(OTHER) - 1 - NUM_SHARED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _no_test_depends_on_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixUplinks, "_compute_s", lambda *_: 1e6)
    monkeypatch.setattr(prefix_uplink, "IDLE_S", 1e6)


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile at a time."""
    monkeypatch.setattr(prefix_uplink, "WINDOW_BYTES", 1)


@asynccontextmanager
async def taking(checkpoint: Checkpoint, **options: object) -> AsyncIterator[PrefillNode]:
    """A prefill node that takes what it is offered."""
    chosen = {"tile_tokens": TILE_TOKENS} | KEEPS | options
    async with prefill_node(str(checkpoint.path), **chosen) as node:
        node.service.takes_prefixes = True
        yield node
        loop = node.service._loop
        loop.prefixes.check_integrity([job.hold for job in loop._jobs.values()])


@asynccontextmanager
async def asked_once(checkpoint: Checkpoint, prefill: PrefillNode, **options: object) -> AsyncIterator[DecodeNode]:
    """A decode node that holds the document."""
    chosen = {"prefill_tile_tokens": TILE_TOKENS} | KEEPS | options
    async with decode_node(str(checkpoint.path), [prefill.address], **chosen) as node:
        await decode(node.address, ONE, request_id="first")
        yield node


def ask_of(node: DecodeNode, address: str) -> None:
    assert node._fetcher is not None
    node._fetcher._prefill_pool = StaticPrefillPool([address], MonotonicClock())


def forget(node: PrefillNode) -> None:
    """All that was kept, as a restarted node has."""
    prefixes = node.service._loop.prefixes
    prefixes._tiles.clear()
    prefixes._lru = SegmentedLru(KEEPS["prefix_cache_bytes"])
    prefixes.held_bytes = 0


def came_up(node: PrefillNode) -> UplinkCounts:
    return node.service._loop.uplinks.counts


def token_bytes(checkpoint: Checkpoint) -> int:
    return KvFormat.of(checkpoint.config, torch.float32).token_bytes


async def test_a_prefill_node_without_the_beginning_computes_the_rest_alone(checkpoint: Checkpoint) -> None:
    async with taking(checkpoint) as first, taking(checkpoint) as fresh, asked_once(checkpoint, first) as node:
        plain = await decode(node.address, OTHER, request_id="plain", cache_salt=b"other", num_chains=3)
        ask_of(node, fresh.address)
        moved = await decode(node.address, OTHER, request_id="moved", num_chains=3)
        again = await decode(node.address, [*DOCUMENT, 3, 4], request_id="again")
        loop = fresh.service._loop
        assert loop.counts.num_tokens == NUM_REST + again.usage.num_prefill_tokens
        assert came_up(fresh) == UplinkCounts(
            num_bytes=NUM_SHARED * token_bytes(checkpoint),
            num_tokens=NUM_SHARED,
            ended=Counter(complete=1),  # it is kept, so the third question asks for nothing
        )
    assert (plain.usage.num_cached_tokens, moved.usage.num_cached_tokens) == (0, NUM_SHARED)
    assert moved.usage.kv_received_bytes == NUM_REST * token_bytes(checkpoint)
    assert (moved.token_ids, moved.logprobs) == (plain.token_ids, plain.logprobs)


async def test_bytes_that_are_spoilt_on_their_way_up_change_no_answer(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection ends, or a bit changes, in the middle of what comes up: another stream goes on from there."""
    monkeypatch.setattr(node_module, "RetryPolicy", lambda: RetryPolicy(first_pause_s=0.001, last_pause_s=0.01))
    monkeypatch.setattr(endpoint, "KEEPALIVE", Keepalive(interval_ms=500, timeout_ms=1_500))
    up_bytes = NUM_SHARED * token_bytes(checkpoint)
    async with (
        taking(checkpoint, job_lease_s=0.1) as fresh,
        relay(fresh.address) as line,
        asked_once(checkpoint, fresh) as node,
    ):
        ask_of(node, line.address)
        num_streams = 0
        for number, (share, mishap) in enumerate(product((0.1, 0.5, 0.9), (Mishap.BREAK, Mishap.FLIP))):
            question = [*DOCUMENT, 30 + number, 31]
            plain = await decode(node.address, question, request_id=f"p{number}", cache_salt=b"other")
            await until_prefill_idle(fresh)
            forget(fresh)
            await line.break_off()
            line.fault = ByteFault(mishap=mishap, at_byte=int(1000 + share * up_bytes), is_from_server=False)
            moved = await decode(node.address, question, request_id=f"m{number}")
            assert (moved.token_ids, moved.logprobs) == (plain.token_ids, plain.logprobs)
            assert moved.usage.num_cached_tokens == NUM_SHARED
            num_streams += moved.usage.num_kv_streams
        assert line.num_spoilt == 6
        assert num_streams > 6
        ended = came_up(fresh).ended
        assert ended["lost"], "a stream broke while tiles came up"
        assert ended.keys() <= {"lost", "complete", "refused"}
        await until_prefill_idle(fresh)


@pytest.mark.parametrize("options", [{"kv_cache_dtype": "int8"}, {}], ids=["int8 pages", "int8 stream"])
async def test_what_was_ever_int8_is_not_offered(checkpoint: Checkpoint, options: dict[str, object]) -> None:
    codec = common_pb2.CODEC_RAW if options else common_pb2.CODEC_INT8
    async with taking(checkpoint) as fresh, asked_once(checkpoint, fresh, **options) as node:
        await decode(node.address, ONE, request_id="held", kv_codec=codec)
        forget(fresh)
        answer = await decode(node.address, OTHER, request_id="r", kv_codec=codec)
        assert answer.usage.num_cached_tokens == NUM_SHARED
        assert came_up(fresh) == UplinkCounts()


async def test_a_beginning_of_other_tiles_than_it_is_named_by_is_not_offered(checkpoint: Checkpoint) -> None:
    """Another question waited for a document that then came in other tiles: its bits are not those of its names."""
    async with taking(checkpoint, tile_tokens=PAGE_TOKENS) as other, taking(checkpoint) as fresh:
        chosen = {"prefill_tile_tokens": TILE_TOKENS} | KEEPS
        async with decode_node(str(checkpoint.path), [other.address], **chosen) as node:
            with gate_before(type(other.service._engine), "step") as gate:
                first = asyncio.create_task(decode(node.address, ONE, request_id="first"))
                await gate.until_reached()
                second = asyncio.create_task(decode(node.address, OTHER, request_id="second"))
                async with asyncio.timeout(LIMIT_S):
                    while len(node.owner._prefills._running) < 2:
                        await asyncio.sleep(0.005)
                ask_of(node, fresh.address)
                gate.open()
                await asyncio.gather(first, second)
        assert fresh.service._loop.counts.num_tokens == len(OTHER) - 1
        assert came_up(fresh) == UplinkCounts()


async def test_callers_that_show_no_certificate_of_a_decode_node_are_asked_for_nothing(checkpoint: Checkpoint) -> None:
    """Whoever could send keys and values could answer other people's questions."""
    authority, path = Authority.new(datetime.now(UTC)), str(checkpoint.path)
    tls = Security(token="t", tls=new_tls(Member.PREFILL, authority))
    async with prefill_node(path) as plain, prefill_node(path, tls) as certain:
        assert not plain.service.takes_prefixes
        assert certain.service.takes_prefixes


class Holder:
    """A caller that holds the document's keys and values, and sends them up as its test wants."""

    def __init__(self, node: PrefillNode, tiles: dict[tuple[int, int], bytes], **options: Any) -> None:
        fields = {"first_token": NUM_SHARED, "held_tile_tokens": TILE_TOKENS, "transfer_id": "t", "epoch": 1} | options
        self.node = node
        self.epoch, self.transfer_id = fields["epoch"], fields["transfer_id"]
        self.caller = Caller(node, OTHER, **fields)
        self._tiles = tiles

    def piece(self, layer: int, first_token: int, **changes: Any) -> pb.HeldTile:
        """As a decode node sends it, but for the changes of its header."""
        kv_format = self.node.service._engine.kv_format
        where = {"layer": layer, "first_token": first_token, "num_tokens": TILE_TOKENS}
        tile = read_payload(memoryview(self._tiles[layer, first_token]), "raw", kv_format, **where)
        message = pb.HeldTile.FromString(encode_tile(tile, transfer_id=self.transfer_id, epoch=self.epoch))
        for name, value in changes.items():
            setattr(message.tile, name, value)
        seal(message.tile)
        return message

    def pieces(self, first_token: int = 0, end_token: int = NUM_SHARED) -> Iterator[pb.HeldTile]:
        """In the order of sending."""
        for start in range(first_token, end_token, TILE_TOKENS):
            for layer in range(self.node.service._engine.kv_format.num_layers):
                yield self.piece(layer, start)

    def send(self, *pieces: pb.HeldTile) -> None:
        for piece in pieces:
            self.caller.say(pb.PullKvRequest(held_tile=piece))

    async def wanted(self) -> pb.PrefixWanted:
        """The next thing that the node wants."""
        while (message := (await self.caller.read(1))[0]).WhichOneof("event") == "queued":
            pass
        assert message.WhichOneof("event") == "prefix_wanted", message.WhichOneof("event")
        return message.prefix_wanted

    async def rest(self) -> tuple[dict[tuple[int, int], bytes], pb.TransferComplete, list[str]]:
        """Payloads of the tiles that come, the last message, and why the node took no more."""
        messages = await self.messages()
        tiles = {(e.tile.layer, e.tile.first_token): e.payload for e in messages if e.WhichOneof("event") == "tile"}
        return tiles, messages[-1].complete, [e.prefix_wanted.refusal for e in messages if e.prefix_wanted.refusal]

    async def messages(self) -> list[pb.PullKvResponse]:
        """All that still come."""
        messages = await self.caller.read(1)
        while messages[-1].WhichOneof("event") != "complete":
            messages += await self.caller.read(1)
        self.caller.close()
        return messages


@pytest.fixture
async def right(checkpoint: Checkpoint) -> dict[tuple[int, int], bytes]:
    """Payloads of all tiles, as a node computes them."""
    async with prefill_node(str(checkpoint.path), tile_tokens=TILE_TOKENS) as node:
        return (await pulled(node, OTHER, "right"))[0]


def rest_of(right: dict[tuple[int, int], bytes]) -> dict[tuple[int, int], bytes]:
    return {place: right[place] for place in right if place[1] >= NUM_SHARED}


def counted(complete: pb.TransferComplete) -> tuple[int, int]:
    return complete.num_computed_tokens, complete.num_cached_tokens


@pytest.mark.usefixtures("small_window")
async def test_the_rest_has_the_same_bits_and_a_window_bounds_what_comes_up(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes]
) -> None:
    async with taking(checkpoint) as node:
        holder = Holder(node, right)
        for end in range(TILE_TOKENS, NUM_SHARED + 1, TILE_TOKENS):
            wanted = await holder.wanted()
            assert (wanted.first_token, wanted.end_token) == (0, end)
            holder.send(*holder.pieces(end - TILE_TOKENS, end))
        tiles, complete, refusals = await holder.rest()
        assert tiles == rest_of(right)
        assert counted(complete) == (NUM_REST + 1, NUM_SHARED)
        assert not refusals
        whole, complete = await pulled(node, OTHER, "again")
        assert whole == right
        assert counted(complete) == (0, len(OTHER))
        _, complete = await pulled(node, OTHER, "other salt", cache_salt=b"s")
        assert counted(complete) == (len(OTHER), 0)


async def test_chain_1s_own_word_is_the_same_behind_a_beginning_that_came_up(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes]
) -> None:
    words = []
    for held_tile_tokens in (0, TILE_TOKENS):
        async with taking(checkpoint) as node:
            holder = Holder(node, right, held_tile_tokens=held_tile_tokens, last_token_id=5)
            if held_tile_tokens:
                await holder.wanted()
                holder.send(*holder.pieces())
            words += [each.provisional_token for each in await holder.messages() if each.HasField("provisional_token")]
            assert came_up(node).num_tokens == (NUM_SHARED if held_tile_tokens else 0)
    without, with_it = words
    assert without == with_it


async def test_what_came_before_a_stream_broke_does_not_come_again(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes]
) -> None:
    async with taking(checkpoint) as node:
        holder = Holder(node, right)
        assert (await holder.wanted()).first_token == 0
        pieces = list(holder.pieces())
        holder.send(*pieces[:-1])
        async with asyncio.timeout(LIMIT_S):
            while not node.service._loop.prefixes.held_bytes or came_up(node).num_bytes:
                await asyncio.sleep(0.005)
            while node.service._loop._jobs["t"].num_cached_tokens < 2 * TILE_TOKENS:
                await asyncio.sleep(0.005)
        holder.caller._call.cancel()
        holder.caller.close()
        holder = Holder(node, right, epoch=2)
        assert (await holder.wanted()).first_token == 2 * TILE_TOKENS
        holder.send(*holder.pieces(2 * TILE_TOKENS))
        tiles, complete, _ = await holder.rest()
        assert tiles == rest_of(right)
        assert counted(complete) == (NUM_REST + 1, NUM_SHARED)
        assert came_up(node).ended == Counter(lost=1, complete=1)


@pytest.mark.parametrize("breaks", [False, True])
async def test_questions_that_come_together_have_one_beginning_brought_up(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes], breaks: bool
) -> None:
    """Those that wait ask for what is missing when the first one's stream breaks."""
    async with taking(checkpoint) as node:
        first = Holder(node, right)
        await first.wanted()
        second = Holder(node, right, transfer_id="u")
        (queued,) = await second.caller.read(1)
        assert queued.WhichOneof("event") == "queued"
        first.send(*first.pieces(0, TILE_TOKENS))
        if breaks:
            async with asyncio.timeout(LIMIT_S):
                while node.service._loop._jobs["t"].num_cached_tokens < TILE_TOKENS:
                    await asyncio.sleep(0.005)
            first.caller._call.cancel()
            assert (await second.wanted()).first_token == TILE_TOKENS
            second.send(*second.pieces(TILE_TOKENS))
        else:
            first.send(*first.pieces(TILE_TOKENS))
            tiles, complete, _ = await first.rest()
            assert (tiles, counted(complete)) == (rest_of(right), (NUM_REST + 1, NUM_SHARED))
        tiles, complete, _ = await second.rest()
        assert tiles == rest_of(right)
        # The first one's rest may be kept by now, too.
        assert complete.num_cached_tokens >= NUM_SHARED
        assert came_up(node).num_tokens == NUM_SHARED
        assert came_up(node).ended == (Counter(lost=1, complete=1) if breaks else Counter(complete=1))
        first.caller.close()


async def test_a_prompt_waits_for_another_ones_beginning_no_longer_than_they_are_alike(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes]
) -> None:
    async with taking(checkpoint) as node:
        first = Holder(node, right)
        await first.wanted()
        begins_alike = asyncio.create_task(pulled(node, [*OTHER[: TILE_TOKENS + 3], 1, 2], "alike"))
        async with asyncio.timeout(LIMIT_S):
            while "alike" not in node.service._loop._jobs:
                await asyncio.sleep(0.005)
        assert node.service._loop._jobs["alike"].stream.awaits_prefix
        first.send(*first.pieces(0, TILE_TOKENS))
        _, complete = await begins_alike
        assert counted(complete) == (5, TILE_TOKENS)
        assert not came_up(node).ended
        first.caller.close()


WRONG: dict[str, tuple[Callable[[Holder], pb.HeldTile], str]] = {
    "a damaged payload": (lambda h: damaged(h.piece(0, TILE_TOKENS)), "the tile at layer 0 token 32 was damaged"),
    "another place": (lambda h: h.piece(1, TILE_TOKENS), "layer 1 token 32 came up where layer 0 token 32"),
    "another stream's": (lambda h: h.piece(0, TILE_TOKENS, epoch=7), "for transfer 't', epoch 7"),
    "NaN": (lambda h: not_finite(h.piece(0, TILE_TOKENS)), "layer 0 token 32 came up with NaN"),
    "a length": (lambda h: h.piece(0, TILE_TOKENS, num_tokens=3), "for 3 tokens"),
}


def damaged(piece: pb.HeldTile) -> pb.HeldTile:
    piece.payload = piece.payload[:-1] + bytes([piece.payload[-1] ^ 1])
    return piece


def not_finite(piece: pb.HeldTile) -> pb.HeldTile:
    piece.payload = np.full(len(piece.payload) // 4, np.nan, dtype=np.float32).tobytes()
    piece.tile.checksum = xxhash.xxh3_64_intdigest(piece.payload)
    seal(piece.tile)
    return piece


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_tile_is_refused_by_name_and_its_prompt_computed(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes], case: str
) -> None:
    """What came whole before it is used; what comes behind it is not."""
    spoil, names = WRONG[case]
    async with taking(checkpoint) as node:
        holder = Holder(node, right)
        await holder.wanted()
        holder.send(*holder.pieces(0, TILE_TOKENS), spoil(holder), *holder.pieces(TILE_TOKENS))
        tiles, complete, (refusal,) = await holder.rest()
        assert names in refusal
        assert tiles == rest_of(right)
        assert counted(complete) == (len(OTHER) - TILE_TOKENS, TILE_TOKENS)
        assert came_up(node).ended == Counter(refused=1)


async def test_a_caller_that_sends_less_than_it_offered_has_the_rest_computed(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes]
) -> None:
    async with taking(checkpoint) as node:
        holder = Holder(node, right)
        await holder.wanted()
        holder.send(*holder.pieces(0, TILE_TOKENS))
        holder.caller.say(pb.PullKvRequest(held_end=pb.HeldEnd()))
        tiles, complete, _ = await holder.rest()
        assert tiles == rest_of(right)
        assert counted(complete) == (len(OTHER) - TILE_TOKENS, TILE_TOKENS)
        assert came_up(node).ended == Counter(withdrawn=1)


async def test_a_caller_that_sends_nothing_is_waited_for_no_longer_than_is_said(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_uplink, "IDLE_S", 0.0)
    async with taking(checkpoint) as node:
        tiles, complete, (refusal,) = await Holder(node, right).rest()
        assert refusal == f"tokens 0 to {NUM_SHARED - 1} did not come up in time"
        assert tiles == rest_of(right)
        assert counted(complete) == (len(OTHER), 0)
        assert came_up(node).ended == Counter(late=1)


async def test_a_prompt_is_given_up_while_its_beginning_comes_up(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes]
) -> None:
    async with taking(checkpoint) as node:
        holder = Holder(node, right)
        await holder.wanted()
        holder.send(next(holder.pieces()))
        holder.caller.say(pb.PullKvRequest(give_up=pb.GiveUp()))
        await holder.caller.read()
        holder.caller.close()
        await until_prefill_idle(node)
        assert not node.service._loop.prefixes.held_bytes


async def test_a_piece_that_nobody_asked_for_is_refused(
    checkpoint: Checkpoint, right: dict[tuple[int, int], bytes]
) -> None:
    async with taking(checkpoint) as node:
        holder = Holder(node, right, held_tile_tokens=TILE_TOKENS + 1)
        holder.send(holder.piece(0, 0))
        assert "held_tile" in str(await holder.caller.error())
        holder.caller.close()
