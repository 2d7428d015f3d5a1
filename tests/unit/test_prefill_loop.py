"""One prompt at a time through the engine, each until its thread has ended; cancelled in the middle of a tile."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels.native import CancelFlag, Cancelled

from colm.errors import CapacityExceeded
from colm.kv import KvFormat
from colm.model.transformer import ChainBlock
from prefill_node import engine as engine_module
from prefill_node.engine import PrefillEngine
from prefill_node.handoff import Handoff
from prefill_node.prefill_loop import PrefillLoop
from tests.gates import LIMIT_S
from tests.tiny import tiny_checkpoint, tiny_config
from tests.unit.test_line import settle


class Job:
    """Yields a message, and another one when it may."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, _: Handoff) -> Iterator[bytes]:
        self.has_begun.set()
        yield b"first"
        assert self.may_end.wait(LIMIT_S)
        yield b"second"


async def no_beat(_: int) -> None:
    pass


async def until_idle(loop: PrefillLoop) -> None:
    async with asyncio.timeout(LIMIT_S):
        while loop.load.num_active:
            await asyncio.sleep(0.005)


@pytest.fixture
async def loop() -> AsyncIterator[PrefillLoop]:
    loop = PrefillLoop(max_queued=1)
    yield loop
    await loop.stop()


async def test_a_job_runs_to_its_end_and_its_messages_come(loop: PrefillLoop) -> None:
    job = Job()
    job.may_end.set()
    handoff = await loop.begin(job, no_beat)
    assert [message async for message in handoff.items()] == [b"first", b"second"]
    await until_idle(loop)


async def test_the_next_job_begins_when_the_thread_has_ended_not_when_its_reader_left(loop: PrefillLoop) -> None:
    first, second = Job(), Job()
    handoff = await loop.begin(first, no_beat)
    handoff.close()
    waiting = asyncio.create_task(loop.begin(second, no_beat))
    await settle()
    assert (loop.load.num_active, loop.load.num_queued) == (1, 1)
    assert not second.has_begun.is_set()
    first.may_end.set()
    second.may_end.set()
    assert [message async for message in (await waiting).items()] == [b"first", b"second"]


async def test_a_job_whose_asker_gave_up_never_begins(loop: PrefillLoop) -> None:
    first, given_up, last = Job(), Job(), Job()
    await loop.begin(first, no_beat)
    waiting = asyncio.create_task(loop.begin(given_up, no_beat))
    await settle()
    waiting.cancel()
    await settle()
    first.may_end.set()
    last.may_end.set()
    handoff = await loop.begin(last, no_beat)
    assert [message async for message in handoff.items()] == [b"first", b"second"]
    assert not given_up.has_begun.is_set()


async def test_the_line_is_bounded(loop: PrefillLoop) -> None:
    first, second = Job(), Job()
    await loop.begin(first, no_beat)
    waiting = asyncio.create_task(loop.begin(second, no_beat))
    await settle()
    with pytest.raises(CapacityExceeded, match="1 requests wait for this prefill node already"):
        await loop.begin(Job(), no_beat)
    waiting.cancel()
    first.may_end.set()


async def test_a_failure_is_the_readers_and_leaves_the_engine_free(loop: PrefillLoop) -> None:
    def fail(_: Handoff) -> Iterator[bytes]:
        yield b"first"
        raise MemoryError

    handoff = await loop.begin(fail, no_beat)
    with pytest.raises(MemoryError):
        async for _ in handoff.items():
            pass
    await until_idle(loop)


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
    """It went on to the end of the tile: seconds, at long contexts."""
    engine, done = tiny_engine(tmp_path), list[str]()
    noting(monkeypatch, engine_module, "prefill_attention", done)
    noting(monkeypatch, ChainBlock, "after_attention", done)

    class Flag(CancelFlag):
        """Found set after some looks from Python."""

        num_looks = 0

        def is_set(self) -> bool:
            self.num_looks += 1
            return self.num_looks > looks_left

    run = engine.run(np.arange(100), cancelled=Flag())
    next(run)
    with pytest.raises(Cancelled):
        next(run)
    assert done == ["prefill_attention", "after_attention"][:looks_left]


def test_a_cancelled_engine_does_not_finish_the_attention_that_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call over a long prefix takes seconds, and was computed to its end for nobody."""
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
