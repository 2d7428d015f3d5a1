"""A line serves in order of arrival, tells each waiter its place, and loses nothing to a cancellation."""

import asyncio

import pytest

from colm import line as line_module
from colm.errors import CapacityExceeded
from colm.line import NUM_NEAR, Line
from tests.gates import LIMIT_S, settle


class Seats:
    """Seats to take, a line in front of them, and the places that waiters were told."""

    def __init__(self, num_free: int, *, max_waiting: int = 100) -> None:
        self.num_free = num_free
        self.line = Line("a seat", max_waiting=max_waiting)
        self.taken: list[str] = []
        self.told: list[tuple[str, int]] = []

    async def turn(self, name: str) -> str:
        async def beat(num_ahead: int) -> None:
            self.told.append((name, num_ahead))

        return await self.line.turn(lambda: self._take(name), beat)

    def free(self, count: int = 1) -> None:
        self.num_free += count
        self.line.look_again()

    def _take(self, name: str) -> str | None:
        if not self.num_free:
            return None
        self.num_free -= 1
        self.taken.append(name)
        return name


async def test_one_clients_crowd_keeps_nobody_else_out() -> None:
    line, taken = Line("a seat", max_waiting=100), list[str]()

    async def turn(name: str, client: str) -> None:
        def take() -> str | None:
            return name if is_free.is_set() else None

        async def beat(_: int) -> None:
            pass

        taken.append(await line.turn(take, beat, client))

    is_free = asyncio.Event()
    crowd = [asyncio.create_task(turn(f"crowd {number}", "crowd")) for number in range(9)]
    await settle()
    other = asyncio.create_task(turn("other", "other"))
    await settle()
    is_free.set()
    line.look_again()
    await asyncio.gather(*crowd, other)
    assert taken[:3] == ["crowd 0", "other", "crowd 1"]


async def test_what_is_free_is_taken_without_a_word() -> None:
    seats = Seats(2)
    assert [await seats.turn("a"), await seats.turn("b")] == ["a", "b"]
    assert seats.told == []


async def test_whoever_came_first_is_first() -> None:
    seats = Seats(0)
    waiting = [asyncio.create_task(seats.turn(name)) for name in "abcd"]
    await settle()
    seats.free(2)
    await settle()
    assert seats.taken == ["a", "b"]
    seats.free(2)
    assert await asyncio.gather(*waiting) == list("abcd")
    assert len(seats.line) == 0


async def test_nobody_overtakes_even_if_there_is_something_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waiter wants more than is free; a newcomer who wants less waits behind it, even when it is woken."""
    monkeypatch.setattr(line_module, "BEAT_INTERVAL_S", 0.001)
    line = Line("pages", max_waiting=10)
    free = 1

    async def turn(wanted: int) -> int:
        return await line.turn(lambda: wanted if wanted <= free else None, lambda _: settle())

    first = asyncio.create_task(turn(2))
    await settle()
    second = asyncio.create_task(turn(1))
    await asyncio.sleep(0.05)
    assert not second.done()
    free = 2
    line.look_again()
    assert await asyncio.wait_for(asyncio.gather(first, second), LIMIT_S) == [2, 1]


async def test_everybody_hears_a_place_at_once_and_again_when_it_changes() -> None:
    seats = Seats(0)
    waiting = [asyncio.create_task(seats.turn(name)) for name in "abc"]
    await settle()
    assert seats.told == [("a", 0), ("b", 1), ("c", 2)]
    seats.free()
    await settle()
    assert seats.told[-2:] == [("b", 0), ("c", 1)]
    seats.free(2)
    await asyncio.gather(*waiting)


async def test_a_departure_is_news_for_the_first_few_behind_it() -> None:
    """A line of N told N places whenever somebody left: a thousand requests took half a million messages."""
    seats = Seats(0)
    waiting = [asyncio.create_task(seats.turn(str(number))) for number in range(5 * NUM_NEAR)]
    await settle()
    assert seats.told == [(str(number), number) for number in range(5 * NUM_NEAR)]
    seats.told.clear()
    seats.line.look_again()  # nothing is free: only the first looks
    await settle()
    assert seats.told == [("0", 0)]
    seats.told.clear()
    seats.free()
    await settle()
    assert seats.told == [(str(number), number - 1) for number in range(1, NUM_NEAR + 1)]
    seats.told.clear()
    waiting[10].cancel()
    await settle()
    assert seats.told == [(str(number), number - 2) for number in range(11, NUM_NEAR + 2)]
    seats.told.clear()
    waiting[3 * NUM_NEAR].cancel()
    await settle()
    assert seats.told == []
    seats.free(5 * NUM_NEAR)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert len(seats.taken) == 5 * NUM_NEAR - 2


async def test_the_word_is_repeated_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "BEAT_INTERVAL_S", 0.01)
    seats = Seats(0)
    waiting = asyncio.create_task(seats.turn("a"))
    async with asyncio.timeout(LIMIT_S):
        while len(seats.told) < 4:
            await asyncio.sleep(0.005)
    seats.free()
    await waiting
    assert set(seats.told) == {("a", 0)}


async def test_one_too_many_is_refused_and_the_others_keep_their_places() -> None:
    seats = Seats(0, max_waiting=2)
    waiting = [asyncio.create_task(seats.turn(name)) for name in "ab"]
    await settle()
    with pytest.raises(CapacityExceeded, match="2 requests wait for a seat already; try again later"):
        await seats.turn("c")
    seats.free(2)
    assert await asyncio.gather(*waiting) == ["a", "b"]


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_who_gives_up_makes_room_for_those_behind(leaver: int) -> None:
    seats = Seats(0)
    waiting = [asyncio.create_task(seats.turn(name)) for name in "abc"]
    await settle()
    waiting[leaver].cancel()
    await settle()
    assert waiting[leaver].cancelled()
    seats.free(2)
    rest = [task for task in waiting if not task.cancelled()]
    assert await asyncio.gather(*rest) == [name for index, name in enumerate("abc") if index != leaver]


async def test_a_cancellation_in_the_moment_of_the_turn_takes_nothing() -> None:
    seats = Seats(0)
    waiting = asyncio.create_task(seats.turn("a"))
    await settle()
    seats.free()
    waiting.cancel()
    await settle()
    assert waiting.cancelled()
    assert (seats.num_free, seats.taken) == (1, [])


async def test_a_listener_that_fails_leaves_the_line() -> None:
    line = Line("a seat", max_waiting=10)

    async def fail(_: int) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await line.turn(lambda: None, fail)
    assert len(line) == 0
