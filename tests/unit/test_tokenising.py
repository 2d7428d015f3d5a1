"""Tokenising threads are few and counted until they have ended; a text's extent is known as its chunks arrive."""

import asyncio
import gc
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.front_door.tokenising import TextExtent, TokenisingThreads
from colm.text.bound import TokenBound

LIMIT_S = 30.0


class Work:
    """Work that goes step by step as the test allows, and counts how many of its kind run."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.steps = threading.Semaphore(0)
        self.num_ended = 0

    def __call__(self, check: Callable[[], None]) -> str:
        self.begun.release()
        try:
            for _ in range(2):
                assert self.steps.acquire(timeout=LIMIT_S)
                check()
            return "done"
        finally:
            self.num_ended += 1

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=LIMIT_S)


async def until_idle(threads: TokenisingThreads) -> None:
    async with asyncio.timeout(LIMIT_S):
        while threads.num_running:
            await asyncio.sleep(0.001)


async def test_work_that_nobody_waits_for_ends_within_one_step_and_counts_until_then() -> None:
    """Bug: a thread whose request was over went on uncounted, to the end of its document."""
    threads, abandoned, next_one = TokenisingThreads(1), Work(), Work()
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    caller = asyncio.create_task(threads.run(abandoned))
    await abandoned.until_begun()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    waiting = asyncio.create_task(threads.run(next_one))
    await asyncio.sleep(0)
    assert (threads.num_running, abandoned.num_ended) == (1, 0)
    assert not next_one.begun.acquire(blocking=False)

    abandoned.steps.release()
    await next_one.until_begun()
    assert (threads.num_running, abandoned.num_ended) == (1, 1)
    next_one.steps.release(2)
    assert await waiting == "done"
    await until_idle(threads)
    gc.collect()
    assert complaints == []


async def test_one_that_is_cancelled_while_it_waits_takes_no_place() -> None:
    threads, running, never = TokenisingThreads(1), Work(), Work()
    first = asyncio.create_task(threads.run(running))
    await running.until_begun()
    second = asyncio.create_task(threads.run(never))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    running.steps.release(2)
    assert await first == "done"
    await until_idle(threads)
    assert await threads.run(lambda _: "free again") == "free again"
    assert not never.begun.acquire(blocking=False)


async def test_no_more_run_than_there_are_threads() -> None:
    threads, work = TokenisingThreads(2), Work()
    callers = [asyncio.create_task(threads.run(work)) for _ in range(5)]
    await work.until_begun()
    await work.until_begun()
    assert threads.num_running == 2
    assert not work.begun.acquire(blocking=False)
    work.steps.release(10)
    assert await asyncio.gather(*callers) == ["done"] * 5
    await until_idle(threads)


@pytest.mark.parametrize("error", [ValueError("broken"), BaseException("panic")])
async def test_an_error_of_the_work_is_its_callers(error: BaseException) -> None:
    def fail(_: Callable[[], None]) -> None:
        raise error

    threads = TokenisingThreads(1)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            await threads.run(fail)
    await until_idle(threads)


TEXT = st.text(st.sampled_from("aé日\U0001f600 \n\t\u2003\x85\x1c"))


@given(text=TEXT, size=st.integers(1, 5))
def test_extent_of_chunks_is_that_of_the_stripped_text(text: str, size: int) -> None:
    data, extent = text.encode(), TextExtent()
    for start in range(0, len(data), size):
        extent.add(data[start : start + size])
    assert extent.num_bytes == len(text.strip().encode())


def test_what_the_tokenizer_passes_over_has_no_extent() -> None:
    extent = TextExtent(TokenBound(max_token_bytes=1, passed_over=b"\x04\xf1"))
    for chunk in (b" a \x04", b"\x04\x04 b", "\U00040000".encode()):
        extent.add(chunk)
    assert extent.num_bytes == len(b"a ") + len(b" b") + 3
