"""A loop that keeps prefixes: what it keeps, for how long it holds what it reads, and what it expects of the rest."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from colm.errors import NotFinite, PeerUnavailable
from prefill_node import kept_maker
from prefill_node.job_bytes import job_bytes
from prefill_node.kept_maker import KeptMaking
from prefill_node.prefill_job import PrefillOrder
from prefill_node.prefix_cache import PrefixCache
from tests.gates import gate_before, settle
from tests.prefill_benches import (
    NUM_SHORT_STEPS,
    NUM_STEPS,
    NUM_TOKENS,
    SHORT,
    Bench,
    SteppedEngine,
    a_bench,
    order,
    sparse_plans,
    two_shorts,
)


@pytest.fixture
async def bench(engine: SteppedEngine) -> AsyncIterator[Bench]:
    prefixes = PrefixCache(engine.kv_format, tile_tokens=engine.tile_tokens, budget_bytes=1 << 30)
    async with a_bench(engine, prefixes=prefixes) as bench:
        yield bench
        bench.loop.prefixes.check_integrity([job.hold for job in bench.loop._jobs.values()])


def again(name: str, number: int = 1) -> str:
    return f"{name}-{number}"


def said_behind(name: str) -> PrefillOrder:
    """The prompt once more, with the word behind it, for which the engine is needed."""
    return replace(order(name), transfer_id=again(name), last_token_id=3)


async def num_kept(bench: Bench, name: str) -> int:
    """Serve a prompt once more; how much of it was kept."""
    stream = bench.loop.attach(replace(order(name), transfer_id=again(name)))
    await bench.read(stream)
    bench.loop.detach(stream)
    return stream.job.num_cached_tokens


async def test_what_was_computed_alone_is_kept(bench: Bench) -> None:
    first = await bench.whole("a")
    assert await num_kept(bench, "a") == NUM_TOKENS
    assert len(first) == NUM_STEPS
    assert bench.loop.counts.num_tokens == NUM_TOKENS


async def test_what_is_computed_in_company_is_not_kept(bench: Bench) -> None:
    """It differs by rounding from what the prompt gives alone."""
    shorts = await two_shorts(bench)
    bench.engine.gates["t"].open()
    await asyncio.gather(*shorts)
    assert await num_kept(bench, SHORT) == 0
    assert await num_kept(bench, SHORT) == 10


@pytest.mark.usefixtures("small_window")
async def test_a_prompt_that_began_alone_and_found_company_is_not_kept(bench: Bench) -> None:
    shorts = {}
    for name in (SHORT, "t"):  # each makes the step of layer 0, which fills its window
        shorts[name] = bench.loop.attach(order(name))
        await bench.until(lambda: not shorts[name].job.has_room)  # noqa: B023
    bench.engine.gates["b"].close()
    other = bench.loop.attach(order("b"))
    await bench.engine.gates["b"].until_reached()
    reading = [asyncio.create_task(bench.read(stream)) for stream in (*shorts.values(), other)]
    await bench.until(lambda: all(stream.job.has_room for stream in shorts.values()))
    bench.engine.gates["b"].open()
    await asyncio.gather(*reading)
    for stream in (*shorts.values(), other):
        bench.loop.detach(stream)
    assert bench.engine.steps[:4] == [SHORT, "t", "b", "s+t"]
    assert await num_kept(bench, SHORT) == 0


async def test_what_a_step_reads_is_held_until_it_has_ended(bench: Bench) -> None:
    await bench.whole("a")
    bench.engine.gates["a"].close()
    stream = bench.loop.attach(said_behind("a"))
    await bench.engine.gates["a"].until_reached()
    await bench.until(lambda: bench.loop._kept.reading is None)
    bench.loop.give_up(stream)
    assert len(stream.job.hold.read) == NUM_STEPS // 2
    bench.loop.prefixes.check_integrity([stream.job.hold])
    bench.engine.gates["a"].open()
    await bench.until(lambda: not bench.loop._stepping)
    assert not stream.job.hold.read


@pytest.mark.parametrize("is_stepping", [False, True])
async def test_kept_tiles_are_held_until_nobody_reads_them(bench: Bench, is_stepping: bool) -> None:
    """Neither the thread that makes their messages nor the engine's, whichever ends last."""
    await bench.whole("a")
    if is_stepping:
        bench.engine.gates["a"].close()
    with gate_before(KeptMaking, "make") as gate:
        first = said_behind("a") if is_stepping else replace(order("a"), transfer_id=again("a"))
        stream = bench.loop.attach(first)
        await gate.until_reached()
        if is_stepping:
            await bench.engine.gates["a"].until_reached()
        bench.loop.give_up(stream)
        assert bench.loop.load.num_active == 1
        assert len(stream.job.hold.read) == NUM_STEPS // 2
        gate.open()
        await bench.until(lambda: bench.loop._kept.reading is None)
    assert bool(stream.job.hold.read) == is_stepping
    bench.loop.prefixes.check_integrity([stream.job.hold])
    bench.engine.gates["a"].open()
    await bench.until(lambda: not bench.loop.load.num_active)
    assert not stream.job.hold.read


async def test_a_prompt_that_is_kept_whole_needs_no_engine(bench: Bench) -> None:
    """Bug: its messages were made in the engine's thread, behind a step of whoever had the engine."""
    first = await bench.whole("a")
    bench.engine.gates["b"].close()
    running = asyncio.create_task(bench.whole("b"))
    await bench.engine.gates["b"].until_reached()
    num_steps = len(bench.engine.steps)
    stream = bench.loop.attach(replace(order("a"), transfer_id=again("a")))
    tiles = await bench.read(stream)
    assert [(tile.begin, tile.end) for tile in tiles] == [(tile.begin, tile.end) for tile in first]
    assert len(bench.engine.steps) == num_steps
    assert bench.loop.prefixes.counts.num_hit_tokens == NUM_TOKENS
    bench.engine.gates["b"].open()
    await running


async def test_what_is_kept_of_a_prompt_is_sent_before_the_engine_has_its_turn(bench: Bench) -> None:
    await bench.whole("a")
    bench.engine.gates["b"].close()
    running = asyncio.create_task(bench.whole("b"))
    await bench.engine.gates["b"].until_reached()
    stream = bench.loop.attach(said_behind("a"))
    kept = await bench.read(stream, num_tiles=NUM_STEPS // 2)
    assert not stream.job.is_begun
    assert stream.job.is_started
    bench.engine.gates["b"].open()
    rest = await bench.read(stream)
    await running
    assert [tile.begin.layer for tile in (*kept, *rest)] == [0] * (NUM_STEPS // 2) + [1] * (NUM_STEPS // 2)
    # With its last layer, as of every prompt.
    assert stream.take_next_token() is not None


async def test_a_prompt_that_is_kept_whole_waits_for_memory_alone(bench: Bench) -> None:
    await bench.whole("a")
    other = bench.loop.attach(order("b"))
    await bench.until(lambda: other.job.is_computed)
    known = replace(order("a"), transfer_id=again("a"))
    needed_bytes = job_bytes(bench.engine, NUM_TOKENS, num_cached_tokens=NUM_TOKENS)
    bench.loop._memory_bytes = other.job.memory_bytes + needed_bytes - 1
    stream = bench.loop.attach(known)
    await settle()
    assert not stream.job.is_started
    await bench.read(other)
    assert len(await bench.read(stream)) == NUM_STEPS


async def test_a_kept_tile_that_cannot_be_sent_ends_its_job_alone(bench: Bench) -> None:
    await bench.whole("a")
    for tile in bench.loop.prefixes._tiles.values():
        tile.layers[0][0].fill_(float("nan"))
    damaged = bench.loop.attach(replace(order("a"), transfer_id=again("a")))
    with pytest.raises(NotFinite):
        await bench.read(damaged)
    assert not damaged.job.hold.read
    assert len(await bench.whole("b")) == NUM_STEPS


async def test_prompts_that_are_kept_take_turns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    names, turns, make = [again("a"), again("b")], list[str](), KeptMaking.make
    for name in "ab":
        await bench.whole(name)

    def noted(making: KeptMaking) -> None:
        turns.append(making.encoder.transfer_id)
        make(making)

    monkeypatch.setattr(kept_maker, "KEPT_BYTES", 1)
    monkeypatch.setattr(KeptMaking, "make", noted)
    streams = [bench.loop.attach(replace(order(name), transfer_id=again(name))) for name in "ab"]
    await asyncio.gather(*map(bench.read, streams))
    assert turns == names * NUM_STEPS


async def test_the_thread_of_kept_tiles_ends_with_the_loop(bench: Bench) -> None:
    await bench.whole("a")
    with gate_before(KeptMaking, "make") as gate:
        stream = bench.loop.attach(replace(order("a"), transfer_id=again("a")))
        await gate.until_reached()
        stopping = asyncio.create_task(bench.loop.stop())
        await settle()
        gate.open()
        await stopping
    assert not any(thread.is_alive() for thread in bench.loop._kept._executor._threads)
    with pytest.raises(PeerUnavailable, match="stops"):
        await bench.read(stream)


async def test_a_job_that_is_refused_or_forgotten_before_it_begins_holds_nothing(bench: Bench) -> None:
    await bench.whole("a")
    bench.engine.gates["b"].close()
    running = asyncio.create_task(bench.whole("b"))
    await bench.engine.gates["b"].until_reached()
    waiting = bench.loop.attach(replace(order("a"), transfer_id=again("a")))
    assert len(waiting.job.hold.read) == NUM_STEPS // 2
    bench.loop.give_up(waiting)
    await bench.until(lambda: not waiting.job.hold.read)
    bench.engine.gates["b"].open()
    await running


async def test_what_is_kept_counts_neither_as_work_nor_as_memory(bench: Bench) -> None:
    """Nor does it share steps: it has none that compute."""
    await bench.whole("a")
    bench.engine.gates["b"].close()
    running = asyncio.create_task(bench.whole("b"))
    await bench.engine.gates["b"].until_reached()
    orders = [said_behind("a"), replace(order("c"), transfer_id=again("c"))]
    streams = [bench.loop.attach(each) for each in orders]
    known, new = (stream.job for stream in streams)
    assert known.remaining_s == pytest.approx(NUM_STEPS * bench.costs.kept_s)
    assert new.remaining_s == pytest.approx(NUM_STEPS * bench.costs.step_s)
    held_bytes = job_bytes(bench.engine, NUM_TOKENS, num_cached_tokens=NUM_TOKENS, reads_last_token=True)
    assert known.memory_bytes == held_bytes < new.memory_bytes
    bench.engine.gates["b"].open()
    await asyncio.gather(running, *map(bench.read, streams))
    assert bench.engine.steps.index("a", NUM_STEPS) < bench.engine.steps.index("c")


async def test_those_that_wait_learn_what_has_been_computed_meanwhile(bench: Bench) -> None:
    bench.engine.gates["a"].close()
    running = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    waiting = bench.loop.attach(replace(order("a"), transfer_id=again("a")))
    await settle()
    assert waiting.job.num_cached_tokens == 0
    bench.engine.gates["a"].open()
    await asyncio.gather(running, bench.read(waiting))
    assert waiting.job.num_cached_tokens == NUM_TOKENS
    assert bench.loop.prefixes.counts.num_hit_tokens == NUM_TOKENS


async def test_a_prompt_that_may_be_sparse_keeps_and_finds_nothing(bench: Bench) -> None:
    stream = bench.loop.attach(replace(order(SHORT), sparse=sparse_plans(bench.engine)))
    assert len(await bench.read(stream)) == NUM_SHORT_STEPS
    assert not bench.loop.prefixes.held_bytes
    assert not stream.job.hold.keys
