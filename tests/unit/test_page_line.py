"""Pages are lent in order of asking; when their last holder lets go, the next in line gets them."""

import asyncio

import pytest

from colm import line as line_module
from colm.errors import CapacityExceeded
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease, PagePool
from decode_node.prefix_cache import PagesWanted
from tests.gates import settle

LIMIT_S = 20.0
CROWD = [("a1", "a"), ("a2", "a"), ("b1", "b")]


async def ignore(_: int) -> None:
    """A beat that nobody hears."""


def pages(line: PageLine, owner: str, num_pages: int) -> "asyncio.Task[PageLease]":
    async def beat(_: int) -> None:
        pass

    async def reserve() -> PageLease:
        return (await line.reserve(owner, PagesWanted(num_pages=num_pages), beat)).lease

    return asyncio.create_task(reserve())


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> PageLine:
    # No waiter looks by itself: one that gets pages was woken.
    monkeypatch.setattr(line_module, "BEAT_INTERVAL_S", 1e6)
    return PageLine(PagePool(8), max_waiting=3)


async def test_pages_are_waited_for_in_order_of_asking(line: PageLine) -> None:
    first = await pages(line, "first", 6)
    large, small = pages(line, "large", 8), pages(line, "small", 1)
    await settle()
    assert line.num_waiting == 2
    line.release(first)
    assert (await large).num_pages == 8
    await settle()
    assert not small.done()
    line.release(await large)
    line.release(await small)
    assert line.pool.num_used == 0


async def test_a_line_says_who_waits_in_the_order_of_their_turns(line: PageLine) -> None:
    first = await pages(line, "first", 8)
    tasks = [asyncio.create_task(line.reserve(name, PagesWanted(num_pages=1), ignore, who)) for name, who in CROWD]
    await settle()
    assert [owner for owner, _ in line.waiting] == ["a1", "b1", "a2"]
    line.release(first)
    await asyncio.gather(*tasks)
    assert line.waiting == []


async def test_the_last_holders_word_frees_pages_for_the_next(line: PageLine) -> None:
    lease = await pages(line, "first", 8)
    line.retain(lease)
    waiting = pages(line, "next", 1)
    line.release(lease)
    await settle()
    assert not waiting.done()
    line.release(lease)
    await asyncio.wait_for(waiting, LIMIT_S)


async def test_who_will_not_wait_gets_pages_only_if_nobody_waits(line: PageLine) -> None:
    first = line.reserve_now("first", PagesWanted(num_pages=7))
    assert first is not None
    assert line.reserve_now("second", PagesWanted(num_pages=2)) is None
    waiting = pages(line, "waiting", 2)
    await settle()
    assert line.reserve_now("third", PagesWanted(num_pages=1)) is None
    line.release(first.lease)
    await waiting
    assert line.reserve_now("third", PagesWanted(num_pages=1)) is not None


async def test_a_line_that_is_full_refuses(line: PageLine) -> None:
    await pages(line, "first", 8)
    waiting = [pages(line, str(number), 1) for number in range(3)]
    await settle()
    with pytest.raises(CapacityExceeded, match="3 requests wait for KV pages"):
        await pages(line, "fourth", 1)
    for task in waiting:
        task.cancel()
