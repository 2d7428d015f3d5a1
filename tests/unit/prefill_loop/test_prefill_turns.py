"""Whose step of the one engine is next: quanta, windows, memory, and the line behind them."""

import asyncio
from dataclasses import replace

import pytest

from prefill_node.cost_model import CostModel, PrefillShape
from prefill_node.job_bytes import job_bytes
from prefill_node.job_policy import Wait
from prefill_node.quantum import QUANTUM_S
from tests.gates import settle
from tests.prefill_benches import (
    NUM_SHORT_STEPS,
    NUM_STEPS,
    NUM_TOKENS,
    SHORT,
    STEP_S,
    Bench,
    SteppedEngine,
    a_bench,
    order,
)


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
    """Bug: on a busy machine steps took seconds, after which the wait was told again, as less, and the test failed."""
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
    places = {name: {wait.num_ahead: wait for wait in reversed(waits)} for name, waits in told.items()}
    assert [*places["b"].values()] == [Wait(num_ahead=0, estimated_s=whole_s)]
    assert [*reversed(places["c"].values())] == [
        Wait(num_ahead=1, estimated_s=2 * whole_s),
        Wait(num_ahead=0, estimated_s=whole_s),
    ]
