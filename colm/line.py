"""A waiting line: clients take turns, first come, first served, and each waiter is told how many are ahead."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator
from typing import TypeVar

from colm.errors import CapacityExceeded
from colm.fair_queue import FairQueue

_T = TypeVar("_T")

BEAT_INTERVAL_S = 2.0
"""Longest time between two messages to a waiter."""

NUM_NEAR = 16
"""Waiters who are told of each change of their place. One who stands further back hears of it with the next beat: if
all did at once, each departure from a line of N would take N messages."""

Beat = Callable[[int], Awaitable[None]]
"""Takes the number of waiters ahead; called as the wait begins, every `BEAT_INTERVAL_S`, and near the front when that
changes."""


class Line:
    """A queue in front of something that can be taken. Lives on one event loop.

    Args:
        what: names that thing in the message of a refusal.
        max_waiting: requests that may wait; the next is refused.
    """

    def __init__(self, what: str, *, max_waiting: int) -> None:
        self._what = what
        self._max_waiting = max_waiting
        self._places: FairQueue[asyncio.Event] = FairQueue()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def places(self) -> Iterator[asyncio.Event]:
        """Those of the waiters, in the order of their turns."""
        return iter(self._places)

    async def turn(
        self,
        take: Callable[[], _T | None],
        beat: Beat,
        client: Hashable = None,
        *,
        place: asyncio.Event | None = None,
    ) -> _T:
        """Wait until the caller is first and `take` returns something other than None; return that.

        Only the first in line calls `take`. Nothing is awaited between its success and this method's return, so a
        cancellation never loses what was taken.

        Args:
            take: what is waited for.
            beat: told how many are ahead.
            client: takes turns with the others.
            place: by which the caller finds itself among `places`; it is set and cleared here alone.

        Raises:
            CapacityExceeded: too many wait already.
        """
        if not self._places and (taken := take()) is not None:
            return taken
        if len(self._places) >= self._max_waiting:
            raise CapacityExceeded(f"{len(self._places)} requests wait for {self._what} already; try again later")
        place = place or asyncio.Event()
        self._places.add(place, client)
        try:
            while True:
                # A newcomer may be first at once, where somebody else was woken.
                if self._places.first is place and (taken := take()) is not None:
                    return taken
                place.clear()
                await beat(self._places.index(place))
                if not place.is_set():
                    await wait_at_most(place, BEAT_INTERVAL_S)
        finally:
            index = self._places.index(place)
            self._places.remove(place)
            # The first of them may be first in line now, and something may be free.
            for behind in self._places.some_behind(index, NUM_NEAR - index):
                behind.set()

    def look_again(self) -> None:
        """Wake the first in line, since something may be free now: it calls `take` again."""
        if self._places:
            self._places.first.set()


async def wait_at_most(event: asyncio.Event, timeout_s: float) -> None:
    """Wait until the event is set, but no longer than the timeout."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
