"""Jobs and the one engine: whose step is next, who reads, what is kept for whom, and the end in mid-tile."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels.native import CancelFlag, Cancelled

from colm.errors import CapacityExceeded, InvalidRequest, TransferSuperseded
from colm.kv import KvFormat, KvTile
from colm.kv_position import KV_START, KvPosition
from colm.model.ffn import ChainFFN
from colm.wire.tile_codec import decode_message, decode_tile
from prefill_node import engine as engine_module
from prefill_node import job_stream, prefill_job
from prefill_node.cost_model import CostModel, PrefillShape
from prefill_node.encoded_tile import EncodedTile
from prefill_node.engine import PrefillEngine
from prefill_node.job_policy import Wait
from prefill_node.job_stream import JobStream, Progress
from prefill_node.prefill_job import PrefillOrder, job_bytes
from prefill_node.prefill_loop import PrefillLoop
from prefill_node.prefill_run import PrefillRun
from prefill_node.quantum import QUANTUM_S
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.clock import FakeClock
from tests.gates import LIMIT_S, Gate
from tests.tiny import tiny_checkpoint, tiny_config
from tests.unit.test_line import settle

NUM_TOKENS = 100
NUM_STEPS = 8  # two layers of four tiles
LEASE_S = 20.0
STALL_S = 30.0
SHORT, NUM_SHORT_STEPS = "s", 2  # two layers of a tile
LENGTHS = dict.fromkeys("abcd", NUM_TOKENS) | {SHORT: 10, "t": 15, "u": 25}  # s and t fit into a tile of 25 tokens
PROMPTS = {name: np.random.default_rng(seed).integers(0, 320, LENGTHS[name]) for seed, name in enumerate(LENGTHS)}
STEP_S = 1.0


class SteppedEngine(PrefillEngine):
    """Notes whose step it makes, and waits at a gate of each prompt in it before."""

    def prepare(self) -> None:
        self.steps: list[str] = []
        self.tiles: dict[str, list[KvTile]] = {name: [] for name in PROMPTS}
        self.gates = {name: Gate() for name in PROMPTS}
        for gate in self.gates.values():
            gate.open()

    def step(self, runs: Sequence[PrefillRun]) -> list[KvTile | None]:
        names = [
            next(name for name, prompt in PROMPTS.items() if np.array_equal(prompt, run.token_ids)) for run in runs
        ]
        for name in names:
            self.gates[name].pass_through()
        self.steps.append("+".join(names))
        tiles = super().step(runs)
        for name, tile in zip(names, tiles, strict=True):
            if tile is not None:
                self.tiles[name].append(KvTile(tile.layer, tile.first_token, tile.k_KTD.clone(), tile.v_KTD.clone()))
        return tiles


def order(name: str, epoch: int = 1, resume_from: KvPosition = KV_START) -> PrefillOrder:
    return PrefillOrder(transfer_id=name, epoch=epoch, token_ids=PROMPTS[name], resume_from=resume_from)


async def no_beat(_: Wait) -> None:
    pass


class Bench:
    """A loop over a real engine, and readers of its jobs."""

    def __init__(self, engine: SteppedEngine, *, num_begun: int = 2, step_s: float = STEP_S, **options: Any) -> None:
        self.engine = engine
        self.clock = FakeClock()
        shape = PrefillShape.of(engine.config, engine.tile_tokens)
        self.costs = CostModel(shape=shape, linear_flop_s=0.0, attention_flop_s=0.0, step_s=step_s)
        memory_bytes = num_begun * job_bytes(engine, NUM_TOKENS)
        chosen = {
            "max_queued": 4,
            "max_queued_s": 1e6,
            "memory_bytes": memory_bytes,
            "lease_s": LEASE_S,
            "stall_s": STALL_S,
            **options,
        }
        self.loop = PrefillLoop(engine, self.costs, self.clock, **chosen)

    async def read(
        self, stream: JobStream, num_tiles: int | None = None, progress: Progress | None = None
    ) -> list[EncodedTile]:
        """Take, store and acknowledge tiles; all of them, or so many."""
        await self.loop.turn(stream, no_beat)
        read: list[EncodedTile] = []
        async with asyncio.timeout(LIMIT_S):
            async for tile in stream.tiles(progress):
                stream.acknowledge(tile.end)
                read.append(tile)
                if len(read) == num_tiles:
                    break
        return read

    async def whole(self, name: str) -> list[EncodedTile]:
        stream = self.loop.attach(order(name))
        try:
            return await self.read(stream)
        finally:
            self.loop.detach(stream)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    @property
    def load(self) -> tuple[int, int]:
        return self.loop.load.num_active, self.loop.load.num_queued


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> SteppedEngine:
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    return SteppedEngine(checkpoint, KvFormat.of(checkpoint.config, torch.float32), tile_tokens=25)


@asynccontextmanager
async def a_bench(engine: SteppedEngine, **options: Any) -> AsyncIterator[Bench]:
    engine.prepare()
    bench = Bench(engine, **options)
    try:
        yield bench
    finally:
        for gate in engine.gates.values():
            gate.open()
        await bench.loop.stop()


@pytest.fixture
async def bench(engine: SteppedEngine) -> AsyncIterator[Bench]:
    async with a_bench(engine) as bench:
        yield bench


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile fills it."""
    monkeypatch.setattr(prefill_job, "WINDOW_BYTES", 1)


async def test_a_job_runs_to_its_end_and_is_forgotten(bench: Bench) -> None:
    tiles = await bench.whole("a")
    assert [tile.begin for tile in tiles] == [(layer, token) for layer in (0, 1) for token in (0, 25, 50, 75)]
    assert tiles[-1].end == (2, 0)
    assert bench.engine.steps == ["a"] * NUM_STEPS
    assert bench.load == (0, 0)


async def test_first_come_first_served(bench: Bench) -> None:
    bench.engine.gates["a"].close()
    first = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    second = asyncio.create_task(bench.whole("b"))
    await settle()
    assert bench.load == (1, 1)
    bench.engine.gates["a"].open()
    await asyncio.gather(first, second)
    assert bench.engine.steps == ["a"] * NUM_STEPS + ["b"] * NUM_STEPS


async def test_a_quantum_ends_with_the_last_tile_however_many_were_counted(engine: SteppedEngine) -> None:
    """Bug: a plan's tiles are longer than those that the cost model counts; one more was asked for than there were."""
    async with a_bench(engine) as bench:
        shape = PrefillShape.of(engine.config, engine.tile_tokens // 5)
        bench.loop._costs = CostModel(shape=shape, linear_flop_s=0.0, attention_flop_s=0.0, step_s=QUANTUM_S / 100)
        assert len(await bench.whole("a")) == NUM_STEPS
        assert bench.load == (0, 0)


@pytest.mark.parametrize(("step_s", "num_before"), [(QUANTUM_S, 1), (QUANTUM_S / 3, 3), (QUANTUM_S / 100, NUM_STEPS)])
async def test_a_short_prompt_goes_before_the_rest_of_a_long_one_after_a_quantum(
    engine: SteppedEngine, step_s: float, num_before: int
) -> None:
    """Bug: whoever came behind a million tokens waited for all of them."""
    async with a_bench(engine, step_s=step_s * 0.999) as bench:
        engine.gates["a"].close()
        long = asyncio.create_task(bench.whole("a"))
        await engine.gates["a"].until_reached()
        short = asyncio.create_task(bench.whole(SHORT))
        await settle()
        engine.gates["a"].open()
        assert len(await short) == NUM_SHORT_STEPS
        await long
        num_after = NUM_STEPS - num_before
        assert engine.steps == ["a"] * num_before + [SHORT] * NUM_SHORT_STEPS + ["a"] * num_after


async def test_short_prompts_without_end_leave_a_long_one_its_share(bench: Bench) -> None:
    bench.engine.gates["a"].close()
    long = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    waiting = asyncio.create_task(bench.whole("b"))
    await settle()
    bench.engine.gates["a"].open()
    num_shorts = 0
    while not long.done():
        stream = bench.loop.attach(replace(order(SHORT), transfer_id=f"short-{num_shorts}"))
        await bench.read(stream)
        bench.loop.detach(stream)
        num_shorts += 1
    await waiting
    assert len(await long) == NUM_STEPS
    assert num_shorts * NUM_SHORT_STEPS <= 3 * NUM_STEPS + NUM_SHORT_STEPS


async def test_a_long_prompt_that_waits_for_memory_is_not_passed_for_ever(engine: SteppedEngine) -> None:
    """Bug to be kept out: short ones that begin in whatever becomes free would keep it out."""
    async with a_bench(engine, memory_bytes=job_bytes(engine, NUM_TOKENS)) as bench:
        engine.gates[SHORT].close()
        first = bench.loop.attach(replace(order(SHORT), transfer_id="short-0"))
        await engine.gates[SHORT].until_reached()
        long = bench.loop.attach(order("a"))
        shorts = [bench.loop.attach(replace(order(SHORT), transfer_id=f"short-{number}")) for number in (1, 2, 3)]
        engine.gates[SHORT].open()
        await asyncio.gather(*map(bench.read, (first, long, *shorts)))
        # Two more begin, as one, before the long one is owed anything.
        before, as_one = [SHORT] * NUM_SHORT_STEPS, ["s+s"] * NUM_SHORT_STEPS
        assert engine.steps == before + as_one + ["a"] * NUM_STEPS + [SHORT] * NUM_SHORT_STEPS


@pytest.mark.usefixtures("small_window")
async def test_a_full_window_ends_a_quantum(engine: SteppedEngine) -> None:
    async with a_bench(engine, step_s=QUANTUM_S / 100) as bench:
        slow = bench.loop.attach(order("a"))
        await bench.until(lambda: not slow.job.has_room)
        await bench.whole("b")
        assert engine.steps == ["a"] + ["b"] * NUM_STEPS
        await bench.read(slow)


async def two_shorts(bench: Bench) -> list[asyncio.Task[list[EncodedTile]]]:
    """Readers of s and t, whose jobs wait at their first step, which they share."""
    bench.engine.gates["a"].close()
    bench.engine.gates["t"].close()
    first = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    shorts = [asyncio.create_task(bench.whole(name)) for name in (SHORT, "t")]
    await settle()
    bench.engine.gates["a"].open()
    await bench.engine.gates["t"].until_reached()
    first.add_done_callback(lambda done: done.exception())
    return shorts


async def test_short_prompts_that_wait_make_their_steps_as_one(bench: Bench) -> None:
    shorts = await two_shorts(bench)
    bench.engine.gates["t"].open()
    assert [len(tiles) for tiles in await asyncio.gather(*shorts)] == [NUM_SHORT_STEPS] * 2
    assert bench.engine.steps[: 1 + NUM_SHORT_STEPS] == ["a", "s+t", "s+t"]


@pytest.mark.parametrize("names", [{"s"}, {"t"}, {"s", "t"}])
async def test_prompts_too_short_to_be_sparse_share_steps_with_all(bench: Bench, names: set[str]) -> None:
    """Bug: who asked for sparse attention never shared a step, though short prompts are dense whatever they ask for."""
    bench.engine.gates["a"].close()
    long = bench.loop.attach(order("a"))
    await bench.engine.gates["a"].until_reached()
    streams = [
        bench.loop.attach(replace(order(name), sparse=sparse_plans(bench.engine) if name in names else None))
        for name in ("s", "t")
    ]
    bench.engine.gates["a"].open()
    await asyncio.gather(*map(bench.read, (long, *streams)))
    assert bench.engine.steps[: 1 + NUM_SHORT_STEPS] == ["a", "s+t", "s+t"]
    assert [stream.job.sparse_report is not None for stream in streams] == [name in names for name in ("s", "t")]


def test_a_prompt_too_short_to_be_sparse_has_the_tiles_of_a_dense_one(engine: SteppedEngine) -> None:
    """A tile that is a whole number of row blocks may be shorter than a prompt that fits into a tile."""
    tiles = [engine.begin(PROMPTS["u"], sparse=sparse).tile_tokens for sparse in (None, sparse_plans(engine))]
    assert tiles == [engine.tile_tokens] * 2


def sparse_plans(engine: PrefillEngine) -> PromptPlans:
    return PromptPlans(SparsePlanner(engine.config, SparsePolicy()))


class Share(CancelFlag):
    """Of an operation that is as far as the test says."""

    share = 0.0
    num_looks = 0

    @property
    def done_share(self) -> float:
        self.num_looks += 1
        return self.share


async def test_a_reader_that_waits_for_a_tile_is_told_how_far_it_is_and_never_of_less(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the progress of a million tokens stood still for the seconds of a tile."""
    monkeypatch.setattr(job_stream, "PROGRESS_INTERVAL_S", 0.001)
    gate, told, flag = bench.engine.gates["a"], asyncio.Queue[KvPosition](), Share()
    gate.close()
    stream = bench.loop.attach(order("a"))
    reading = asyncio.create_task(bench.read(stream, progress=told.put))
    await gate.until_reached()
    stream.job.cancelled = flag  # the loop's end of it
    for flag.share, num_told in ((0.2, 1), (0.6, 2), (0.1, 2), (0.8, 3)):
        num_looks = flag.num_looks
        await bench.until(lambda: told.qsize() == num_told and flag.num_looks > num_looks + 2)  # noqa: B023
    flag.share = 0.0
    gate.open()
    await reading
    assert [told.get_nowait() for _ in range(3)] == [(0, 5), (0, 15), (0, 20)]
    assert told.empty()


@pytest.mark.parametrize("window_bytes", [1, prefill_job.WINDOW_BYTES])
async def test_readers_get_the_bits_that_their_own_runs_produced(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    """However jobs take turns, share steps and wait for their readers."""
    monkeypatch.setattr(prefill_job, "WINDOW_BYTES", window_bytes)
    async with a_bench(engine, num_begun=len(PROMPTS), max_queued=len(PROMPTS)) as bench:
        streams = {name: bench.loop.attach(order(name)) for name in PROMPTS}
        read = dict(zip(streams, await asyncio.gather(*map(bench.read, streams.values())), strict=True))
        assert any("+" in names for names in engine.steps)
        for name, tiles in read.items():
            for tile, computed in zip(tiles, engine.tiles[name], strict=True):
                header, payload = decode_message(tile.message)
                got = decode_tile(header.tile, payload, engine.kv_format)
                assert (got.layer, got.first_token) == (computed.layer, computed.first_token)
                assert torch.equal(got.k_KTD, computed.k_KTD)
                assert torch.equal(got.v_KTD, computed.v_KTD)


async def test_one_that_is_given_up_inside_a_shared_step_leaves_the_other_its_tiles(bench: Bench) -> None:
    shorts = await two_shorts(bench)
    job = bench.loop._jobs[SHORT]
    assert job.stream is not None
    bench.loop.give_up(job.stream)
    bench.engine.gates["t"].open()
    assert len(await shorts[1]) == NUM_SHORT_STEPS
    assert bench.engine.steps[1:3] == ["s+t", "t"]
    assert not bench.engine.tiles[SHORT]
    shorts[0].cancel()


async def test_one_that_fails_inside_a_shared_step_ends_with_its_error_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = engine_module.prefill_attention

    def attend(q_THE: torch.Tensor, *tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(q_THE) == LENGTHS[SHORT]:
            raise MemoryError
        return attention(q_THE, *tensors, **options)

    monkeypatch.setattr(engine_module, "prefill_attention", attend)
    shorts = await two_shorts(bench)
    bench.engine.gates["t"].open()
    with pytest.raises(MemoryError):
        await shorts[0]
    assert len(await shorts[1]) == NUM_SHORT_STEPS
    assert SHORT not in bench.loop._jobs


@pytest.mark.usefixtures("small_window")
async def test_one_whose_window_is_full_leaves_the_others_and_goes_on_alone(bench: Bench) -> None:
    bench.engine.gates["a"].close()
    first = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    slow, other = (bench.loop.attach(order(name)) for name in (SHORT, "t"))
    bench.engine.gates["a"].open()
    assert len(await bench.read(other)) == NUM_SHORT_STEPS
    await first
    assert [names for names in bench.engine.steps if names != "a"] == ["s+t", "t"]
    assert len(await bench.read(slow)) == NUM_SHORT_STEPS
    assert bench.engine.steps[-1] == SHORT


async def test_a_shared_step_is_predicted_and_learnt_from_once(bench: Bench) -> None:
    gate = bench.engine.gates["t"]
    shorts = await two_shorts(bench)
    bench.clock.now_s += STEP_S
    gate.open()
    await asyncio.gather(*shorts)
    assert bench.costs.step_s == pytest.approx(STEP_S)


async def test_what_steps_take_corrects_the_costs(bench: Bench) -> None:
    gate = bench.engine.gates["a"]
    gate.close()
    reading = asyncio.create_task(bench.whole("a"))
    await gate.until_reached()
    bench.clock.now_s += 3 * STEP_S
    gate.open()
    await reading
    assert STEP_S < bench.costs.step_s < 3 * STEP_S


async def test_a_prompt_that_never_fits_is_refused_with_the_numbers(engine: SteppedEngine) -> None:
    needed_bytes = job_bytes(engine, NUM_TOKENS)
    async with a_bench(engine, memory_bytes=needed_bytes - 1) as bench:
        with pytest.raises(InvalidRequest, match=rf"=100: needs {needed_bytes} bytes .* have {needed_bytes - 1} in"):
            bench.loop.check(NUM_TOKENS)
        bench.loop.check(NUM_TOKENS - 1)


async def test_a_sparse_prompt_whose_plan_does_not_fit_is_refused_with_the_numbers(engine: SteppedEngine) -> None:
    sparse = PromptPlans(SparsePlanner(engine.config, SparsePolicy(dense_below_tokens=0)))
    needed_bytes = job_bytes(engine, NUM_TOKENS, sparse)
    async with a_bench(engine, memory_bytes=needed_bytes - 1) as bench:
        bench.loop.check(NUM_TOKENS)
        with pytest.raises(InvalidRequest, match=rf"=100: needs {needed_bytes} bytes .* have {needed_bytes - 1} in"):
            bench.loop.check(NUM_TOKENS, sparse)


async def test_a_prompt_that_would_wait_too_long_is_refused_and_a_shorter_one_is_not(engine: SteppedEngine) -> None:
    async with a_bench(engine, max_queued_s=STEP_S * (NUM_STEPS - 0.5)) as bench:
        engine.gates["a"].close()
        first = asyncio.create_task(bench.whole("a"))
        await engine.gates["a"].until_reached()
        with pytest.raises(CapacityExceeded, match=r"about 8 s at this prefill node, .*max_queued_s=7\.5"):
            bench.loop.attach(order("b"))
        short = asyncio.create_task(bench.whole(SHORT))
        await settle()
        assert bench.load == (1, 1)
        engine.gates["a"].open()
        await asyncio.gather(first, short)
        assert bench.load == (0, 0)


@pytest.mark.usefixtures("small_window")
async def test_the_next_one_uses_the_engine_while_a_window_is_full_and_no_longer(bench: Bench) -> None:
    slow = bench.loop.attach(order("a"))
    await bench.until(lambda: not slow.job.has_room)
    assert len(await bench.whole("b")) == NUM_STEPS
    assert bench.engine.steps == ["a"] + ["b"] * NUM_STEPS
    assert len(await bench.read(slow)) == NUM_STEPS
    assert bench.load == (0, 0)


@pytest.mark.usefixtures("small_window")
async def test_at_most_so_many_have_begun(bench: Bench) -> None:
    slow = [bench.loop.attach(order(name)) for name in "ab"]
    await bench.until(lambda: not any(stream.job.has_room for stream in slow))
    third = asyncio.create_task(bench.whole("c"))
    await settle()
    assert bench.load == (2, 1)
    await bench.read(slow[0])
    assert len(await third) == NUM_STEPS
    await bench.read(slow[1])


@pytest.mark.usefixtures("small_window")
async def test_a_job_that_nobody_reads_gives_way_when_the_engine_would_idle(bench: Bench) -> None:
    """Two callers that went away would keep everybody else waiting until their leases end."""
    for name in "ab":
        stream = bench.loop.attach(order(name))
        await bench.until(lambda stream=stream: not stream.job.has_room)
        bench.loop.detach(stream)
    assert bench.load == (2, 0)
    assert len(await bench.whole("c")) == NUM_STEPS
    assert bench.load == (1, 0)


async def test_everybody_who_waits_hears_how_many_come_before(bench: Bench) -> None:
    bench.engine.gates["a"].close()
    first = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    told: dict[str, list[Wait]] = {"b": [], "c": []}

    async def wait(name: str) -> None:
        async def beat(wait: Wait) -> None:
            told[name].append(wait)

        stream = bench.loop.attach(order(name))
        await bench.loop.turn(stream, beat)
        await bench.read(stream)
        bench.loop.detach(stream)

    waiting = [asyncio.create_task(wait(name)) for name in told]
    await settle()
    bench.engine.gates["a"].open()
    await asyncio.gather(first, *waiting)
    whole_s = NUM_STEPS * STEP_S
    # Each once: a wait of seconds is told again.
    assert list(dict.fromkeys(told["b"])) == [Wait(num_ahead=0, estimated_s=whole_s)]
    assert list(dict.fromkeys(told["c"])) == [
        Wait(num_ahead=1, estimated_s=2 * whole_s),
        Wait(num_ahead=0, estimated_s=whole_s),
    ]


async def test_the_line_is_bounded_and_a_refused_job_leaves_nothing(engine: SteppedEngine) -> None:
    async with a_bench(engine, max_queued=1) as bench:
        bench.engine.gates["a"].close()
        first = asyncio.create_task(bench.whole("a"))
        await bench.engine.gates["a"].until_reached()
        second = asyncio.create_task(bench.whole("b"))
        await settle()
        with pytest.raises(CapacityExceeded, match="1 requests wait for this prefill node already"):
            bench.loop.attach(order("c"))
        assert bench.load == (1, 1)
        bench.engine.gates["a"].open()
        await asyncio.gather(first, second)


async def test_the_next_job_begins_when_a_given_up_step_has_ended_and_not_before(bench: Bench) -> None:
    bench.engine.gates["a"].close()
    stream = bench.loop.attach(order("a"))
    await bench.engine.gates["a"].until_reached()
    bench.loop.detach(stream)
    bench.clock.now_s += LEASE_S
    bench.loop.look_again()
    waiting = asyncio.create_task(bench.whole("b"))
    await settle()
    assert bench.load == (1, 1)
    assert bench.engine.steps == []
    bench.engine.gates["a"].open()
    assert len(await waiting) == NUM_STEPS
    assert bench.engine.steps.count("a") == 1
    assert (bench.loop.counts.num_leases_expired, bench.loop.counts.num_tokens) == (1, NUM_TOKENS)


async def test_a_job_whose_reader_left_before_its_turn_never_begins(bench: Bench) -> None:
    bench.engine.gates["a"].close()
    first = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    bench.loop.detach(bench.loop.attach(order("b")))
    bench.engine.gates["a"].open()
    await first
    await bench.whole("c")
    assert "b" not in bench.engine.steps


@pytest.mark.usefixtures("small_window")
async def test_a_job_waits_for_its_reader_and_goes_on_where_that_one_was(bench: Bench) -> None:
    """Bug: a broken connection cost the whole computation."""
    broken = bench.loop.attach(order("a"))
    read = await bench.read(broken, 3)
    bench.loop.detach(broken)
    bench.clock.now_s += LEASE_S - 1
    bench.loop.look_again()
    again = bench.loop.attach(order("a", epoch=2, resume_from=read[-1].end))
    read += await bench.read(again)
    assert [tile.begin for tile in read] == [(layer, token) for layer in (0, 1) for token in (0, 25, 50, 75)]
    assert bench.engine.steps == ["a"] * NUM_STEPS


@pytest.mark.usefixtures("small_window")
async def test_a_job_without_a_reader_is_cancelled_and_forgotten_when_its_lease_is_over(bench: Bench) -> None:
    stream = bench.loop.attach(order("a"))
    await bench.read(stream, 3)
    await bench.until(lambda: not stream.job.has_room)
    bench.loop.detach(stream)
    bench.clock.now_s += LEASE_S - 1
    bench.loop.look_again()
    assert not stream.job.cancelled.is_set()
    bench.clock.now_s += 1
    bench.loop.look_again()
    assert stream.job.cancelled.is_set()
    assert stream.job.run is None
    assert bench.load == (0, 0)


@pytest.mark.usefixtures("small_window")
async def test_a_lease_ends_by_itself(engine: SteppedEngine) -> None:
    async with a_bench(engine, lease_s=0.01) as bench:
        stream = bench.loop.attach(order("a"))
        bench.clock.now_s += 1000
        await bench.until(lambda: not stream.job.has_room)
        bench.loop.detach(stream)
        bench.clock.now_s += 1000
        await bench.until(lambda: bench.load == (0, 0))


async def test_a_newer_stream_takes_the_job_over_and_the_older_one_is_told(bench: Bench) -> None:
    older = bench.loop.attach(order("a"))
    read = await bench.read(older, 2)
    reading = asyncio.create_task(bench.read(older))
    bench.engine.gates["a"].close()
    newer = bench.loop.attach(order("a", epoch=2, resume_from=read[-1].end))
    with pytest.raises(TransferSuperseded, match="in epoch 2 by now"):
        await reading
    bench.loop.detach(older)
    bench.engine.gates["a"].open()
    rest = await bench.read(newer)
    assert {tile.epoch for tile in rest} == {2}
    assert rest[0].begin == read[-1].end
    assert bench.engine.steps == ["a"] * NUM_STEPS


async def test_a_reader_that_has_lost_what_it_acknowledged_gets_all_of_it_anew(bench: Bench) -> None:
    older = bench.loop.attach(order("a"))
    await bench.read(older, 2)
    newer = bench.loop.attach(order("a", epoch=2))
    with pytest.raises(TransferSuperseded, match="begins anew in epoch 2"):
        await bench.read(older)
    assert len(await bench.read(newer)) == NUM_STEPS


async def test_another_node_computes_what_it_must_and_brings_only_the_rest(bench: Bench) -> None:
    since = KvPosition(0, 60)
    rest = await bench.read(bench.loop.attach(order("a", epoch=2, resume_from=since)))
    assert [tile.begin for tile in rest] == [since, (0, 75), (1, 0), (1, 25), (1, 50), (1, 75)]
    assert bench.engine.steps == ["a"] * NUM_STEPS


async def test_a_failure_is_the_readers_and_leaves_the_engine_free(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "prefill_attention", fail)
        stream = bench.loop.attach(order("a"))
        await bench.until(lambda: stream.job.error)
        with pytest.raises(MemoryError):
            await bench.read(stream)
        bench.loop.detach(stream)
    assert bench.load == (0, 0)
    assert len(await bench.whole("b")) == NUM_STEPS


def tiny_engine(folder: Path, **options: Any) -> PrefillEngine:
    checkpoint = tiny_checkpoint(folder / "tiny", tiny_config(**options))
    return PrefillEngine(
        checkpoint, KvFormat.of(checkpoint.config, torch.float32), tile_tokens=options.get("max_context", 32)
    )


def noting(patch: pytest.MonkeyPatch, owner: Any, name: str, done: list[str]) -> None:
    """Note each call that returns."""
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        done.append(name)
        return result

    patch.setattr(owner, name, noted)


@pytest.mark.parametrize("looks_left", [0, 1, 2])
def test_a_cancelled_engine_ends_between_two_operations_of_its_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks_left: int
) -> None:
    """Bug: a cancelled engine went on to the end of its tile, which takes seconds at long contexts."""
    engine, done = tiny_engine(tmp_path), list[str]()
    attention = engine_module.prefill_attention
    # Without the flag, which attention looks at as often as its variant has blocks.
    monkeypatch.setattr(engine_module, "prefill_attention", lambda *tensors, cancelled, backend: attention(*tensors))  # noqa: ARG005
    noting(monkeypatch, engine_module, "prefill_attention", done)
    noting(monkeypatch, ChainFFN, "forward", done)

    class Flag(CancelFlag):
        """Found set after some looks from Python, beside the one before the first step."""

        num_looks = 0

        def is_set(self) -> bool:
            self.num_looks += 1
            return self.num_looks > 1 + looks_left

    run = engine.run(np.arange(100), cancelled=Flag())
    next(run)
    with pytest.raises(Cancelled):
        next(run)
    assert done == ["prefill_attention", "forward"][:looks_left]


def test_a_cancelled_engine_does_not_finish_the_attention_that_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: one call over a long prefix, which takes seconds, was computed to its end for nobody."""
    engine, flag, events = tiny_engine(tmp_path, max_context=1 << 15), CancelFlag(), list[str]()
    noting(monkeypatch, engine_module, "prefill_attention", events)
    attention, is_inside = engine_module.prefill_attention, threading.Event()

    def entered(*args: Any, **kwargs: Any) -> Any:
        is_inside.set()
        return attention(*args, **kwargs)

    monkeypatch.setattr(engine_module, "prefill_attention", entered)
    run = engine.run(np.arange(1 << 15) % 320, cancelled=flag)
    next(run)

    def cancel() -> None:
        assert is_inside.wait(LIMIT_S)
        flag.set()

    with ThreadPoolExecutor() as threads:
        cancelling = threads.submit(cancel)
        with pytest.raises(Cancelled):
            next(run)
        cancelling.result()
    assert events == []


async def test_what_the_engine_does_can_be_seen_inside_a_step_too(bench: Bench) -> None:
    assert bench.loop.mark is None
    bench.engine.gates["a"].close()
    whole = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    stands = bench.loop.mark
    assert stands is not None
    assert bench.loop.mark == stands
    (job,) = bench.loop._stepping
    job.cancelled._shared.done = 1
    assert bench.loop.mark not in (None, stands)
    bench.engine.gates["a"].open()
    await whole
    await bench.until(lambda: bench.loop.mark is None)
