"""A job that is given up ends in mid-tile, between two operations or inside one."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels.native import CancelFlag, Cancelled

from colm.kv import KvFormat
from colm.model.ffn import ChainFFN
from prefill_node import engine as engine_module
from prefill_node.engine import PrefillEngine
from tests.gates import LIMIT_S, settle
from tests.prefill_benches import LEASE_S, NUM_STEPS, NUM_TOKENS, Bench, order
from tests.tiny import tiny_checkpoint, tiny_config


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
