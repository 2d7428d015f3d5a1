"""A job and its readers: whoever comes, leaves and stores what, each tile is brought once, in order, bit for bit."""

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv_reference
from colm_kernels.native import CancelFlag
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from colm.errors import InvalidRequest, PeerUnavailable, TransferSuperseded
from colm.flops import LayerFlops
from colm.kv import KvFormat, KvTile
from colm.kv_position import KV_START, KvPosition
from colm.request import KvCodec
from colm.wire.shared_memory import SharedMemory
from colm.wire.tile_codec import decode_message, decode_tile
from prefill_node import job_stream, prefill_job
from prefill_node.cost_model import CostModel, PrefillShape
from prefill_node.encoded_tile import EncodedTile
from prefill_node.job_stream import JobStream
from prefill_node.kept_maker import KeptMaking
from prefill_node.prefill_job import PrefillJob, PrefillOrder
from prefill_node.prefill_run import PrefillRun
from prefill_node.prefix_cache import KeptTile, PrefixHold
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.tiny import tiny_config

FORMAT = KvFormat(num_layers=2, num_kv_heads=2, head_dim=4, dtype=torch.float32)
NUM_TOKENS = 12
END = KvPosition(FORMAT.num_layers, 0)


def order(epoch: int, resume_from: KvPosition = KV_START, codec: KvCodec = "raw", first_token: int = 0) -> PrefillOrder:
    return PrefillOrder(
        transfer_id="t",
        epoch=epoch,
        token_ids=np.arange(NUM_TOKENS),
        resume_from=resume_from,
        codec=codec,
        first_token=first_token,
    )


def new_job(first: PrefillOrder, hold: PrefixHold | None = None) -> PrefillJob:
    shape = PrefillShape(
        layer=LayerFlops(keys_values=1, rest=1),
        num_layers=FORMAT.num_layers,
        num_heads=1,
        head_dim=FORMAT.head_dim,
        tile_tokens=5,
    )
    costs = CostModel(shape=shape, linear_flop_s=1.0, attention_flop_s=1.0, step_s=1.0)
    return PrefillJob(
        first, place=0, kv_format=FORMAT, costs=costs, begun_bytes=1000, on_change=lambda: None, hold=hold
    )


def after_int8(x_LZKTD: Tensor) -> Tensor:
    """Keys and values as they come out of the codec, by its definition."""
    rows = x_LZKTD.reshape(-1, 1, FORMAT.head_dim)
    return dequantise_kv(*quantise_kv_reference(rows), FORMAT.dtype).view(x_LZKTD.shape)


def positions(first: KvPosition, last: KvPosition) -> st.SearchStrategy[KvPosition]:
    every = [KvPosition(layer, token) for layer in range(FORMAT.num_layers) for token in range(NUM_TOKENS)]
    return st.sampled_from([position for position in [*every, END] if first <= position <= last])


def begin(job: PrefillJob) -> None:
    num_layers, flag = FORMAT.num_layers, CancelFlag()
    run = PrefillRun(job.token_ids, num_layers=num_layers, tile_tokens=5, sparse=None, cancelled=flag)
    job.begin(None if job.is_computed else run)


def share(stream: JobStream, *, takes_several: bool = False) -> SharedMemory:
    """What the stream's reader opens."""
    if not stream.job.is_begun:
        begin(stream.job)
    memory = stream.share()
    stream.answer(is_mapped=True, takes_several=takes_several)
    return memory


def keep_one_more(hold: PrefixHold, computed: Tensor) -> None:
    """Let one more tile of 5 tokens be kept of what was computed, (layer, k or v, kv head, token, dim)."""
    first = hold.num_cached_tokens
    own = slice(first, min(first + 5, NUM_TOKENS))
    layers = [(kv[0, :, own].clone(), kv[1, :, own].clone()) for kv in computed]
    num_tokens = own.stop - first
    hold.read.append(
        KeptTile(key=b"", parent=b"", first_token=first, num_tokens=num_tokens, num_bytes=0, layers=layers)
    )


class JobMachine(RuleBasedStateMachine):
    """Against a reader that stores what it gets and says so whenever it likes.

    Tiles at the prompt's beginning are kept. Their messages are made while the engine computes the others, and more of
    them may be found until it begins.
    """

    codec: KvCodec = "raw"

    @initialize(seed=st.integers(0, 9), first_token=st.sampled_from([0, 5, 10]), num_kept=st.integers(0, 3))
    def create(self, seed: int, first_token: int, num_kept: int) -> None:
        self.first_token = first_token
        generator = torch.Generator().manual_seed(seed)
        shape = (FORMAT.num_layers, 2, FORMAT.num_kv_heads, NUM_TOKENS, FORMAT.head_dim)
        self.computed = torch.randn(shape, generator=generator)
        self.truth = self.computed if self.codec == "raw" else after_int8(self.computed)
        self.stored = torch.zeros(shape)
        self.position = KV_START
        self.produced = KV_START
        """By the engine; 0 in a layer stands for what is kept of it."""
        self.made = np.zeros((FORMAT.num_layers + 1, NUM_TOKENS + 1), dtype=bool)
        """Tokens of a layer whose messages there are, or were."""
        self.making: KeptMaking | None = None
        self.epoch = 1
        first = order(1, codec=self.codec, first_token=first_token)
        self.hold = PrefixHold(num_tokens=NUM_TOKENS)
        for _ in range(num_kept):
            self.keep_one_more()
        self.job = new_job(first, self.hold)
        self.job.start()
        self.stream: JobStream | None = self.job.attach(first)
        self.older: list[JobStream] = []

    @property
    def num_kept_tokens(self) -> int:
        return self.hold.num_cached_tokens

    def keep_one_more(self) -> None:
        keep_one_more(self.hold, self.computed)

    @precondition(lambda self: not self.job.is_begun and self.num_kept_tokens < NUM_TOKENS)
    @rule()
    def find_more(self) -> None:
        self.keep_one_more()
        self.job.find_more(1000)

    @precondition(lambda self: not self.job.is_begun)
    @rule()
    def begin(self) -> None:
        begin(self.job)

    @precondition(lambda self: self.making is None and self.job.next_kept is not None)
    @rule()
    def begin_to_make_kept(self) -> None:
        self.making = KeptMaking.of(self.job)

    @precondition(lambda self: self.making is not None)
    @rule(room_bytes=st.sampled_from([1, 200, 10_000]))
    def make_kept(self, room_bytes: int) -> None:
        making, self.making = self.making, None
        assert making is not None
        begin, making.room_bytes = making.end, room_bytes
        making.make()
        self.job.add_kept(making.messages, making.end)
        for layer in range(begin.layer, making.end.layer + 1):
            first = begin.token if layer == begin.layer else self.first_token
            last = making.end.token if layer == making.end.layer else self.num_kept_tokens
            self.made[layer, first:last] = True

    @precondition(lambda self: self.job.is_begun and self.num_kept_tokens < NUM_TOKENS and self.produced < END)
    @rule(num_tokens=st.integers(1, 5))
    def compute(self, num_tokens: int) -> None:
        begin = self.produced.at_least(self.num_kept_tokens)
        layer, first = begin
        last = min(first + num_tokens, NUM_TOKENS)
        tile = KvTile(layer, first, *self.computed[layer, :, :, first:last])
        self.made[layer, first:last] = True
        self.produced = begin.after(last - first, NUM_TOKENS)
        encoded = self.job.encoder.encode(
            tile, epoch=self.job.epoch, since=self.job.acknowledged, memory=self.job.read_memory
        )
        self.job.produce(encoded, self.produced)

    @precondition(lambda self: self.stream is not None)
    @rule()
    def share(self) -> None:
        """The reader opens the job's memory, or opens it again in a newer stream."""
        assert self.stream is not None
        with suppress(OSError):  # once all is computed there is nothing that could go there
            share(self.stream)

    @precondition(lambda self: self.stream is not None)
    @rule()
    def read(self) -> None:
        assert self.stream is not None
        tile = self.stream.take()
        expected = self.position.at_least(self.first_token)
        assert (tile is None) == (not self.made[expected])
        if tile is None:
            return
        header, payload = decode_message(tile.message)
        if tile.slot is not None:
            assert self.stream.reads_memory
            assert (header.tile.shared.offset_bytes, header.tile.shared.num_bytes) == (
                tile.slot.offset_bytes,
                tile.payload_bytes,
            )
            payload = tile.slot.payload
        got = decode_tile(header.tile, payload, FORMAT, self.codec)
        assert header.tile.epoch == self.epoch
        assert (got.layer, got.first_token) == expected == tile.begin
        assert tile.payload_bytes == len(payload)
        both_ZKTD = torch.stack((got.k_KTD, got.v_KTD))
        if got.scale_ZKT is not None:
            both_ZKTD = both_ZKTD * got.scale_ZKT.float().unsqueeze(3)
        self.stored[got.layer, :, :, got.first_token : got.first_token + got.num_tokens] = both_ZKTD
        self.position = tile.end

    @precondition(lambda self: self.stream is not None)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        assert self.stream is not None
        self.stream.acknowledge(data.draw(positions(self.job.acknowledged, self.position)))

    @precondition(lambda self: self.stream is not None and self.position < END)
    @rule()
    def acknowledge_what_was_not_sent(self) -> None:
        assert self.stream is not None
        with pytest.raises(InvalidRequest, match="must lie between"):
            self.stream.acknowledge(END)

    @rule(data=st.data(), breaks_off=st.booleans())
    def resume(self, data: st.DataObject, breaks_off: bool) -> None:
        """By the reader itself, which knows what it has; it may have got more elsewhere meanwhile."""
        if self.stream is not None:
            self.older.append(self.stream)
        if breaks_off:
            self.job.stream = None
        self.epoch += 1
        resume_from = data.draw(positions(self.position, END))
        for layer in range(FORMAT.num_layers):
            for token in range(NUM_TOKENS):
                if self.position <= (layer, token) < resume_from:
                    self.stored[layer, :, :, token] = self.truth[layer, :, :, token]
        self.position = resume_from
        again = order(self.epoch, resume_from, self.codec, self.first_token)
        assert self.job.can_resume(again)
        self.stream = self.job.attach(again)

    @rule()
    def an_older_stream_gets_nothing_more(self) -> None:
        for stream in self.older:
            with pytest.raises(TransferSuperseded):
                stream.take()
            with pytest.raises(TransferSuperseded):
                stream.acknowledge(self.position)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "job"):
            self.job.check_integrity()
            assert (self.job.remaining_s > 0) == (not self.job.is_computed)
            is_kept = self.num_kept_tokens == NUM_TOKENS
            assert self.job.is_computed == (is_kept or END in (self.produced, self.job.acknowledged))
            for layer in range(FORMAT.num_layers):
                num_stored = (
                    NUM_TOKENS if layer < self.position.layer else self.position.token * (layer == self.position.layer)
                )
                own = slice(self.first_token, num_stored)
                assert torch.equal(self.stored[layer, :, :, own], self.truth[layer, :, :, own])

    def teardown(self) -> None:
        if hasattr(self, "job"):
            self.job.cancel()


TestPrefillJob = JobMachine.TestCase


class Int8JobMachine(JobMachine):
    """The same in int8, of which nothing is rounded twice."""

    codec = "int8"


TestInt8PrefillJob = Int8JobMachine.TestCase


def test_what_is_found_while_kept_tiles_are_made_follows_them() -> None:
    """Bug: the last tile that was known ended its layer, and what was found behind it was never sent."""
    hold, computed = PrefixHold(num_tokens=NUM_TOKENS), torch.randn(FORMAT.num_layers, 2, 2, NUM_TOKENS, 4)
    keep_one_more(hold, computed)
    job = new_job(order(1), hold)
    job.start()
    stream = job.attach(order(1))
    for found in (True, False):
        making = KeptMaking.of(job)
        if found:
            keep_one_more(hold, computed)
            job.find_more(1000)
        making.make()
        job.add_kept(making.messages, making.end)
        job.check_integrity()
    tiles = [stream.take(), stream.take()]
    assert [tile and tile.begin for tile in tiles] == [KvPosition(0, 0), KvPosition(0, 5)]
    assert job.next_kept is None
    job.cancel()


def test_what_is_computed_waits_for_the_kept_tiles_before_it() -> None:
    hold, computed = PrefixHold(num_tokens=NUM_TOKENS), torch.randn(FORMAT.num_layers, 2, 2, NUM_TOKENS, 4)
    keep_one_more(hold, computed)
    job = new_job(order(1), hold)
    stream = job.attach(order(1))
    begin(job)
    making = KeptMaking.of(job)
    tile = KvTile(0, 5, *computed[0, :, :, 5:10])
    job.produce(job.encoder.encode(tile, epoch=1, since=KV_START, memory=None), KvPosition(0, 10))
    assert stream.take() is None
    making.make()
    job.add_kept(making.messages, making.end)
    tiles = [stream.take(), stream.take()]
    assert [tile and tile.begin for tile in tiles] == [KvPosition(0, 0), KvPosition(0, 5)]
    job.cancel()


def test_nothing_is_made_of_kept_tiles_once_their_job_is_given_up() -> None:
    hold = PrefixHold(num_tokens=NUM_TOKENS)
    keep_one_more(hold, torch.randn(FORMAT.num_layers, 2, 2, NUM_TOKENS, 4))
    job = new_job(order(1), hold)
    job.attach(order(1))
    making = KeptMaking.of(job)
    job.cancel()
    making.make()
    assert not making.messages


def test_a_slot_is_taken_again_only_when_its_tile_has_been_stored() -> None:
    job = new_job(order(1))
    stream = job.attach(order(1))
    memory = share(stream)
    memory._free = memory._free[:1]
    tiles = [
        KvTile(0, first, *torch.full((2, FORMAT.num_kv_heads, 4, FORMAT.head_dim), float(first))) for first in (0, 4, 8)
    ]

    def encode(number: int) -> EncodedTile:
        (encoded,) = job.encoder.encode(tiles[number], epoch=1, since=KV_START, memory=job.read_memory)
        job.produce([encoded], encoded.end)
        return encoded

    first, second = encode(0), encode(1)
    assert first.slot is not None
    assert second.slot is None
    assert stream.take() == first
    stream.acknowledge(first.end)
    assert encode(2).slot is first.slot
    job.cancel()


@pytest.mark.parametrize(
    ("takes_several", "in_memory", "max_tiles", "num_together"),
    [(True, "mmmmm", 8, 5), (True, "mmmmm", 3, 3), (True, "mmsmm", 8, 2), (False, "mmmmm", 8, 1)],
)
def test_only_tiles_that_wait_in_memory_share_a_message(
    monkeypatch: pytest.MonkeyPatch, takes_several: bool, in_memory: str, max_tiles: int, num_together: int
) -> None:
    """m: in memory, s: with its payload on the stream."""
    monkeypatch.setattr(job_stream, "MAX_SHARED_TILES", max_tiles)
    job = new_job(order(1))
    stream = job.attach(order(1))
    share(stream, takes_several=takes_several)
    tiles = []
    for number, place in enumerate(in_memory):
        tile = KvTile(0, number, *torch.randn(2, FORMAT.num_kv_heads, 1, FORMAT.head_dim))
        memory = job.read_memory if place == "m" else None
        tiles += job.encoder.encode(tile, epoch=1, since=KV_START, memory=memory)
    job.produce(tiles, tiles[-1].end)
    assert [stream.take(), *stream.take_shared()] == tiles[:num_together]
    if num_together < len(tiles):
        assert stream.take() == tiles[num_together]
    job.cancel()


def test_a_newer_stream_that_reads_no_memory_gets_on_the_stream_what_lies_there() -> None:
    job = new_job(order(1))
    share(job.attach(order(1)))
    tile = KvTile(0, 0, *torch.randn(2, FORMAT.num_kv_heads, 5, FORMAT.head_dim))
    (encoded,) = job.encoder.encode(tile, epoch=1, since=KV_START, memory=job.read_memory)
    job.produce([encoded], encoded.end)
    again = job.attach(order(2)).take()
    assert encoded.slot is not None
    assert again is not None
    assert again.slot is None
    header, payload = decode_message(again.message)
    assert not header.tile.HasField("shared")
    assert torch.equal(decode_tile(header.tile, payload, FORMAT).k_KTD, tile.k_KTD)
    job.cancel()


def test_a_tile_that_was_damaged_in_memory_ends_its_job() -> None:
    job = new_job(order(1))
    share(job.attach(order(1)))
    tile = KvTile(0, 0, *torch.zeros(2, FORMAT.num_kv_heads, 5, FORMAT.head_dim))
    (encoded,) = job.encoder.encode(tile, epoch=1, since=KV_START, memory=job.read_memory)
    job.produce([encoded], encoded.end)
    assert encoded.slot is not None
    encoded.slot.payload[3] ^= 1
    again = job.attach(order(2))
    with pytest.raises(PeerUnavailable, match="was damaged"):
        again.take()
    assert isinstance(job.error, PeerUnavailable)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_stream_that_is_not_newer_is_refused_and_changes_nothing(epoch: int) -> None:
    job = new_job(order(2))
    stream = job.attach(order(2))
    with pytest.raises(TransferSuperseded, match=f"in epoch 2 already, this is {epoch}"):
        job.attach(order(epoch))
    stream.require_current()


def test_a_job_cannot_bring_again_what_it_has_forgotten_nor_another_prompt_attention_or_codec() -> None:
    job = new_job(order(1))
    job.attach(order(1, KvPosition(0, 5)))
    assert job.can_resume(order(2, KvPosition(0, 5)))
    assert not job.can_resume(order(2, KvPosition(0, 4)))
    sparse = PromptPlans(SparsePlanner(tiny_config(), SparsePolicy()))
    assert not job.can_resume(replace(order(2, KvPosition(0, 5)), sparse=sparse))
    assert new_job(replace(order(1), sparse=sparse)).can_resume(replace(order(2), sparse=sparse))
    assert not job.can_resume(order(2, KvPosition(0, 5), "int8"))
    assert not job.can_resume(order(2, KvPosition(0, 5), first_token=5))
    assert not job.can_resume(replace(order(2, KvPosition(0, 5)), cache_salt=b"another's"))
    assert new_job(order(1, codec="int8")).can_resume(order(2, codec="int8"))
    other = PrefillOrder(transfer_id="t", epoch=2, token_ids=np.arange(NUM_TOKENS) + 1, resume_from=KvPosition(0, 5))
    assert not job.can_resume(other)


def tile_at(first: int, num_tokens: int) -> KvTile:
    return KvTile(0, first, *torch.zeros(2, FORMAT.num_kv_heads, num_tokens, FORMAT.head_dim))


@pytest.mark.parametrize("num_later", [0, 1])
def test_what_a_step_brings_that_a_newer_stream_has_from_elsewhere_is_passed_over(num_later: int) -> None:
    """Bug: the step had begun before; its tiles were dropped, and the stream read others from the window's end."""
    job = new_job(order(1))
    job.attach(order(1))
    begun = job.encoder.encode(tile_at(0, 5), epoch=1, since=job.acknowledged)
    begun += job.encoder.encode(tile_at(5, 3 * num_later), epoch=1, since=job.acknowledged) if num_later else []
    newer = job.attach(order(2, KvPosition(0, 5)))
    job.produce(begun, KvPosition(0, 5 + 3 * num_later))
    job.produce(job.encoder.encode(tile_at(5 + 3 * num_later, 4), epoch=2, since=job.acknowledged), KvPosition(0, 9))
    taken = newer.take()
    assert taken is not None
    assert (taken.begin, taken.epoch) == ((0, 5), 2)


def test_a_full_window_has_room_again_when_enough_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_job, "WINDOW_BYTES", 500)
    job = new_job(order(1))
    stream = job.attach(order(1))
    tile = KvTile(0, 0, *torch.zeros(2, FORMAT.num_kv_heads, NUM_TOKENS, FORMAT.head_dim))
    job.produce(job.encoder.encode(tile, epoch=1, since=KV_START), KvPosition(1, 0))
    assert not job.has_room
    assert stream.take() is not None
    stream.acknowledge(KvPosition(0, NUM_TOKENS - 1))
    assert not job.has_room
    stream.acknowledge(KvPosition(1, 0))
    assert job.has_room


class Share(CancelFlag):
    """Of an operation that is as far as the test says."""

    share = 0.0

    @property
    def done_share(self) -> float:
        return self.share


def begun_job(sparse: PromptPlans | None = None) -> tuple[PrefillJob, Share]:
    job, flag = new_job(replace(order(1), sparse=sparse)), Share()
    job.begin(PrefillRun(job.token_ids, num_layers=FORMAT.num_layers, tile_tokens=5, sparse=sparse, cancelled=flag))
    job.cancelled = flag
    return job, flag


def test_a_job_reaches_into_the_tile_that_its_step_computes_and_never_past_it() -> None:
    job, flag = begun_job()
    for produced, reached in (
        ((0, 0), [(0, 0), (0, 2), (0, 5)]),
        ((0, 10), [(0, 10), (0, 11), (1, 0)]),  # the last tile has two tokens
        ((1, 0), [(1, 0), (1, 2), (1, 5)]),
        ((2, 0), [(2, 0)] * 3),
    ):
        job.produce([], KvPosition(*produced))
        seen = []
        for flag.share in (0.0, 0.5, 1.0):
            seen.append(job.reached)
        assert seen == reached


def test_a_sparse_job_reaches_a_tiles_end_with_the_plan_and_the_attention_of_the_layer_before() -> None:
    """And never passes it, however many steps the plan takes beyond those that were expected."""
    policy = SparsePolicy(mass=None, keys_per_row=400, dense_below_tokens=0)
    sparse = PromptPlans(SparsePlanner(tiny_config(), policy))
    job, flag = begun_job(sparse)
    all_there, num_tiles, reached = KvPosition(1, 0), 3, []
    num_steps = sparse.num_plan_steps(0, NUM_TOKENS) + num_tiles + 1
    for num_pauses in range(num_steps + 3):
        job.produce([], all_there, num_pauses)
        for flag.share in (0.0, 0.5, 1.0):
            reached.append(job.reached)
    expected = reached[: 3 * num_steps]
    assert expected == sorted(expected)
    assert (expected[0], expected[-1]) == (all_there, (1, 5))
    assert len(set(expected)) > 3
    assert max(reached) == (1, 5)


def test_positions_follow_the_order_of_travel() -> None:
    places = [KV_START]
    while places[-1] < END:
        places.append(places[-1].after(4, NUM_TOKENS))
    assert places == [(0, 0), (0, 4), (0, 8), (1, 0), (1, 4), (1, 8), (2, 0)]
    assert all(one < other for one, other in pairwise(places))


def test_what_chain_1_says_next_is_taken_once_a_stream_by_those_that_asked_it_of_this_job() -> None:
    first = replace(order(1), last_token_id=7)
    job = new_job(first)
    begin(job)
    stream = job.attach(first)
    assert job.run is not None
    assert stream.take_next_token() is None
    job.run.next_token_id = 4
    job.produce([], END)
    assert [stream.take_next_token() for _ in range(2)] == [4, None]
    others = [replace(order(epoch + 2), last_token_id=last) for epoch, last in enumerate((7, None, 8))]
    assert [job.attach(other).take_next_token() for other in others] == [4, None, None]
