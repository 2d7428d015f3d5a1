"""Whether work that has begun goes on: what a process says to whoever would restart it."""

from collections.abc import Callable, Hashable
from typing import Final

from colm.clock import Clock

STUCK_AFTER_S: Final = 60.0
"""Longer than any step of an engine takes without a sign of progress."""
_LONGEST_GAP_S: Final = 5.0


class Watch:
    """Looked at about once a second. Work that shows no progress for `STUCK_AFTER_S` is stuck.

    Time counts while somebody looks: after a pause in which nobody did, or in which the whole process stood still, the
    work has as long as before.

    Args:
        clock: measures the time between looks.
        mark: what differs after each piece of work; None while there is none to do.
    """

    def __init__(self, clock: Clock, mark: Callable[[], Hashable | None]) -> None:
        self._clock = clock
        self._mark = mark
        self._last: Hashable | None = None
        self._looked_s = clock.now()
        self._still_s = 0.0

    def goes_on(self) -> bool:
        """Look: whether there is nothing to do, or something was done lately."""
        now_s, mark = self._clock.now(), self._mark()
        if mark is None or mark != self._last:
            self._still_s = 0.0
        else:
            self._still_s += min(now_s - self._looked_s, _LONGEST_GAP_S)
        self._last, self._looked_s = mark, now_s
        return self._still_s < STUCK_AFTER_S
