"""Jobs and the one engine: who is taken, who is refused, and what is told of either."""

import asyncio
from typing import Any

import pytest

from colm.errors import CapacityExceeded, InvalidRequest
from prefill_node import engine as engine_module
from prefill_node.job_bytes import job_bytes
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.gates import settle
from tests.prefill_benches import NUM_STEPS, NUM_TOKENS, SHORT, STEP_S, Bench, SteppedEngine, a_bench, order


async def test_a_job_runs_to_its_end_and_is_forgotten(bench: Bench) -> None:
    tiles = await bench.whole("a")
    assert [tile.begin for tile in tiles] == [(layer, token) for layer in (0, 1) for token in (0, 25, 50, 75)]
    assert tiles[-1].end == (2, 0)
    assert bench.engine.steps == ["a"] * NUM_STEPS
    assert bench.load == (0, 0)


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
