"""Waiting in order: whoever came first is served first, and everybody hears how many come before."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from colm.errors import CapacityExceeded

_T = TypeVar("_T")

BEAT_INTERVAL_S = 2.0
"""The longest silence towards someone who waits."""

Beat = Callable[[int], Awaitable[None]]
"""Told how many come before; called as the wait begins, when that changes, and every `BEAT_INTERVAL_S`."""


class Line:
    """A queue in front of something that can be taken. Lives on one event loop.

    Args:
        what: that thing, for the message of a refusal.
        max_waiting: who comes when so many wait is refused.
    """

    def __init__(self, what: str, *, max_waiting: int) -> None:
        self._what = what
        self._max_waiting = max_waiting
        self._places: deque[asyncio.Event] = deque()

    def __len__(self) -> int:
        return len(self._places)

    async def turn(self, take: Callable[[], _T | None], beat: Beat) -> _T:
        """Wait until one is first and `take` gives something; returns that.

        `take` is called by the first alone, and must hand over in one go: between its success and this method's return
        nothing is awaited, so a cancellation never loses what was taken.

        Raises:
            CapacityExceeded: too many wait already.
        """
        if not self._places and (taken := take()) is not None:
            return taken
        if len(self._places) >= self._max_waiting:
            raise CapacityExceeded(f"{len(self._places)} requests wait for {self._what} already; try again later")
        place = asyncio.Event()
        self._places.append(place)
        try:
            while True:
                place.clear()
                await beat(self._places.index(place))
                if not place.is_set():
                    await wait_at_most(place, BEAT_INTERVAL_S)
                if self._places[0] is place and (taken := take()) is not None:
                    return taken
        finally:
            self._places.remove(place)
            self.look_again()

    def look_again(self) -> None:
        """Something may be free now."""
        for place in self._places:
            place.set()


async def wait_at_most(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, or that long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
