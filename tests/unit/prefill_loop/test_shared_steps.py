"""Short prompts that wait together make their steps as one, each with its own bits."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from colm_kernels.native import CancelFlag

from colm.kv_position import KvPosition
from colm.wire.tile_codec import decode_message, decode_tile
from prefill_node import engine as engine_module
from prefill_node import job_stream, prefill_job
from tests.prefill_benches import (
    LENGTHS,
    NUM_SHORT_STEPS,
    PROMPTS,
    SHORT,
    STEP_S,
    Bench,
    SteppedEngine,
    a_bench,
    order,
    sparse_plans,
    two_shorts,
)


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
