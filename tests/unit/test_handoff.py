"""From the compute thread to the event loop: in order, bounded, and over when either side goes."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing

import pytest

from prefill_node.handoff import Handoff

LIMIT_S = 60.0
MAX_ITEMS = 3


class Producer:
    """Yields numbers as bytes, counts them, and says when it was let go."""

    def __init__(self, num_items: int, error: Exception | None = None) -> None:
        self.num_items = num_items
        self.error = error
        self.num_produced = 0
        self.ended = threading.Event()

    def __call__(self) -> Iterator[bytes]:
        try:
            for number in range(self.num_items):
                self.num_produced += 1
                yield str(number).encode()
            if self.error is not None:
                raise self.error
        finally:
            self.ended.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


async def ended(thread: "Future[None]") -> None:
    """Wait for a writer's thread."""
    await asyncio.wait_for(asyncio.wrap_future(thread), LIMIT_S)


@pytest.fixture
async def make_handoff(
    threads: ThreadPoolExecutor,  # noqa: ARG001 - ends after the handoffs are closed
) -> AsyncIterator[Callable[[int], Handoff]]:
    """Makes handoffs that are closed in the end: a writer that still waited would keep the process alive."""
    made: list[Handoff] = []

    def make(max_items: int) -> Handoff:
        made.append(Handoff(max_items))
        return made[-1]

    yield make
    for handoff in made:
        handoff.close()


async def until_stable(producer: Producer, at_least: int) -> None:
    """Wait until so many have been produced, then let the thread go as far as it will."""
    async with asyncio.timeout(LIMIT_S):
        while producer.num_produced < at_least:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)


async def test_everything_arrives_in_order_and_then_the_stream_ends(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff = make_handoff(MAX_ITEMS)
    thread = handoff.start(Producer(100), threads)
    assert [int(item) async for item in handoff.items()] == list(range(100))
    await ended(thread)


async def test_a_producer_of_nothing_ends_the_stream(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff = make_handoff(MAX_ITEMS)
    thread = handoff.start(Producer(0), threads)
    assert [item async for item in handoff.items()] == []
    await ended(thread)


async def test_a_reader_that_does_not_read_stops_the_writer(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff, producer = make_handoff(MAX_ITEMS), Producer(100)
    thread = handoff.start(producer, threads)
    await until_stable(producer, MAX_ITEMS + 1)
    assert producer.num_produced == MAX_ITEMS + 1
    handoff.close()
    await ended(thread)


async def test_a_slow_reader_keeps_the_writer_at_its_pace(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff, producer = make_handoff(MAX_ITEMS), Producer(30)
    thread = handoff.start(producer, threads)
    num_read = 0
    async for _ in handoff.items():
        num_read += 1
        await asyncio.sleep(0.002)
        assert producer.num_produced <= num_read + MAX_ITEMS + 1
    assert num_read == 30
    await ended(thread)


async def test_closing_ends_a_writer_that_waits_for_room(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff, producer = make_handoff(1), Producer(100)
    thread = handoff.start(producer, threads)
    await until_stable(producer, 2)
    handoff.close()
    await ended(thread)
    assert producer.num_produced == 2
    assert producer.ended.is_set()


async def test_closing_ends_a_writer_that_has_room(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff, producer = make_handoff(1000), Producer(1)
    handoff.close()
    assert handoff.closed.is_set()
    await ended(handoff.start(producer, threads))
    assert [item async for item in handoff.items()] == []


async def test_a_reader_that_leaves_half_way_and_closes_ends_the_writer(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff, producer = make_handoff(MAX_ITEMS), Producer(1000)
    thread = handoff.start(producer, threads)
    async with aclosing(handoff.items()) as items:
        async for item in items:
            if item == b"5":
                break
    handoff.close()
    await ended(thread)
    assert producer.num_produced < 1000


async def test_a_writers_error_reaches_the_reader_after_its_items(
    make_handoff: Callable[[int], Handoff], threads: ThreadPoolExecutor
) -> None:
    handoff = make_handoff(MAX_ITEMS)
    handoff.start(Producer(7, error=ValueError("no weights")), threads)
    read: list[int] = []
    with pytest.raises(ValueError, match="no weights"):  # noqa: PT012 - raised by the iteration
        async for item in handoff.items():
            read.append(int(item))  # noqa: PERF401 - what was read before the error counts
    assert read == list(range(7))
