"""Who reads a job: streams that break, leave, take over and come back."""

import asyncio

import pytest

from colm.errors import TransferSuperseded
from colm.kv_position import KvPosition
from tests.prefill_benches import LEASE_S, NUM_STEPS, Bench, SteppedEngine, a_bench, order


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
