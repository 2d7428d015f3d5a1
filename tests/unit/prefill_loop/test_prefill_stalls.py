"""A reader that acknowledges nothing keeps the memory of its job so long, and less where others wait for it."""

import asyncio
from dataclasses import replace

import pytest

from colm.errors import ReaderStalled
from prefill_node.job_bytes import job_bytes
from prefill_node.job_stream import JobStream
from prefill_node.prefill_loop import UNHURRIED_STALLS
from tests.gates import settle
from tests.prefill_benches import NUM_STEPS, NUM_TOKENS, SHORT, STALL_S, Bench, SteppedEngine, a_bench, order

pytestmark = pytest.mark.usefixtures("small_window")


async def stalled(bench: Bench, name: str) -> JobStream:
    """A stream whose window is full."""
    stream = bench.loop.attach(order(name))
    await bench.until(lambda: not stream.job.has_room)
    return stream


def later(bench: Bench, seconds: float) -> None:
    bench.clock.now_s += seconds
    bench.loop.look_again()


async def test_who_acknowledges_nothing_makes_way_for_who_waits_for_its_memory(engine: SteppedEngine) -> None:
    """Bug: a reader that never read kept the engine idle and the first in line out for ever."""
    async with a_bench(engine, num_begun=1) as bench:
        slow = await stalled(bench, "a")
        waiting = asyncio.create_task(bench.whole("b"))
        await settle()
        later(bench, STALL_S - 1)
        await settle()
        assert bench.load == (1, 1)
        later(bench, 1)
        assert len(await waiting) == NUM_STEPS
        with pytest.raises(
            ReaderStalled, match=rf"for {STALL_S:g} s and others wait for its memory; prefill\.stall_s="
        ):
            await bench.read(slow)
        assert slow.job.cancelled.is_set()
        assert slow.job.tile(slow.job.first_number) is None


async def test_a_reader_has_longer_while_nobody_waits_for_its_memory(bench: Bench) -> None:
    slow = await stalled(bench, "a")
    await bench.whole(SHORT)
    later(bench, UNHURRIED_STALLS * STALL_S - 1)
    assert bench.load == (1, 0)
    later(bench, 1)
    assert bench.load == (0, 0)
    with pytest.raises(ReaderStalled, match=r"for 300 s; prefill\.stall_s=30"):
        await bench.read(slow)


async def test_each_acknowledgement_begins_the_time_anew_and_one_of_nothing_does_not(engine: SteppedEngine) -> None:
    async with a_bench(engine, num_begun=1) as bench:
        slow = await stalled(bench, "a")
        waiting = asyncio.create_task(bench.whole("b"))
        await settle()
        for _ in range(3):
            later(bench, STALL_S - 1)
            await bench.read(slow, 1)
            await bench.until(lambda: not slow.job.has_room)
        later(bench, STALL_S - 1)
        slow.acknowledge(slow.job.acknowledged)
        later(bench, 1)
        assert len(await waiting) == NUM_STEPS


async def test_the_last_tiles_are_not_waited_for_either(engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_node.prefill_job.WINDOW_BYTES", 1 << 30)
    async with a_bench(engine, memory_bytes=job_bytes(engine, NUM_TOKENS)) as bench:
        slow = bench.loop.attach(order("a"))
        await bench.until(lambda: slow.job.is_computed)
        waiting = asyncio.create_task(bench.whole("b"))
        await settle()
        later(bench, STALL_S)
        assert len(await waiting) == NUM_STEPS


async def test_a_newer_stream_has_its_own_time(engine: SteppedEngine) -> None:
    async with a_bench(engine, num_begun=1) as bench:
        await stalled(bench, "a")
        waiting = asyncio.create_task(bench.whole("b"))
        await settle()
        later(bench, STALL_S - 1)
        newer = bench.loop.attach(order("a", epoch=2))
        later(bench, STALL_S - 1)
        assert newer.job.error is None
        assert len(await bench.read(newer)) == NUM_STEPS
        await waiting


async def test_a_job_whose_turn_is_not_now_is_not_stalled(engine: SteppedEngine) -> None:
    """Only its reader's own idleness counts, not the engine's."""
    async with a_bench(engine, num_begun=1) as bench:
        engine.gates["a"].close()
        stream = bench.loop.attach(order("a"))
        await engine.gates["a"].until_reached()
        waiting = bench.loop.attach(replace(order("b")))
        later(bench, 100 * STALL_S)
        assert stream.job.error is None
        engine.gates["a"].open()
        await bench.read(stream)
        await bench.read(waiting)


async def test_the_time_ends_by_itself(engine: SteppedEngine) -> None:
    async with a_bench(engine, num_begun=1, stall_s=0.01) as bench:
        await stalled(bench, "a")
        waiting = asyncio.create_task(bench.whole("b"))
        await settle()
        bench.clock.now_s += 1
        assert len(await waiting) == NUM_STEPS


async def test_only_time_in_which_full_windows_alone_hinder_the_engine_is_counted(engine: SteppedEngine) -> None:
    async with a_bench(engine) as bench:
        slow = await stalled(bench, "a")
        later(bench, 3.0)
        assert bench.loop.counts.reader_wait_s == 3.0
        assert bench.loop.load.window_bytes > 0
        engine.gates["b"].close()
        other = bench.loop.attach(order("b"))
        await engine.gates["b"].until_reached()
        later(bench, 5.0)
        assert bench.loop.counts.reader_wait_s == 3.0
        engine.gates["b"].open()
        for stream in (other, slow):
            await bench.read(stream)
        later(bench, 7.0)
        assert bench.loop.counts.reader_wait_s == 3.0
        assert bench.loop.load.window_bytes == 0
