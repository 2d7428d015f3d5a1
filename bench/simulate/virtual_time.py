"""An event loop whose clock jumps to the next timer: discrete-event simulation of code that is written for asyncio.

The cluster's decisions are asyncio code: lines, leases, placements. On this loop they run as they are. Whatever takes
time in a simulation is a timer; nothing waits for the machine, so equal inputs give equal runs.
"""

import asyncio
import gc
import math
import selectors
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

_ALLOCATIONS_A_LOOK: Final = 50_000


class NothingLeft(RuntimeError):
    """Somebody waits, and no timer is left that could wake anybody."""


class _JumpingSelector(selectors.SelectSelector):
    """Never waits for files: what the loop would wait is added to the time instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingLeft("the simulation waits for what no timer brings")
        if timeout > 0:
            # Up, or a timer may find itself one rounding before its time, for ever.
            self.now_s = math.nextafter(self.now_s + timeout, math.inf)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs callbacks and coroutines in the order of their times; begins at 0 s."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Simulated seconds."""
        return self._jumping.now_s


class LoopClock:
    """`colm.clock.Clock` on a loop's time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        """Seconds since the loop began."""
        return self._loop.time()


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in simulated time.

    Meanwhile garbage is looked for rarely: there is little, and each look goes through a million objects that stay.

    Raises:
        NothingLeft: it waits for something that never comes.
    """
    before = gc.get_threshold()
    gc.set_threshold(_ALLOCATIONS_A_LOOK, 20, 20)
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main)
    finally:
        gc.set_threshold(*before)
