"""What makes the steps of engines: a processor of one node, or one that several nodes share."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Processor(Protocol):
    """Makes steps one after the other, for each of its users."""

    is_shared: bool
    """Steps may take longer than was said as they began."""

    def run(self, steps_s: Sequence[float], done: Callable[[], None]) -> None:
        """Make steps that take so long alone, and say when the last one has ended."""


class OwnProcessor:
    """Nobody else uses it."""

    is_shared = False

    def run(self, steps_s: Sequence[float], done: Callable[[], None]) -> None:
        """See `Processor`."""
        asyncio.get_running_loop().call_later(sum(steps_s), done)


@dataclass(eq=False, slots=True)
class _Use:
    left_s: float
    done: Callable[[], None]


class SharedProcessor:
    """Processor sharing: of n users at once, each is slowed down by the same factor, 1 + (n - 1) * contention.

    Args:
        contention: 1 where the users' work is added up, as of engines whose threads use all cores; 0 where each has
            cores enough of its own.
    """

    is_shared = True

    def __init__(self, contention: float = 1.0) -> None:
        self._contention = contention
        self._loop = asyncio.get_running_loop()
        self._uses: list[_Use] = []
        self._seen_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def run(self, steps_s: Sequence[float], done: Callable[[], None]) -> None:
        """See `Processor`."""
        self._pass_time()
        self._uses.append(_Use(sum(steps_s), done))
        self._look_again()

    @property
    def _slowdown(self) -> float:
        return 1 + (len(self._uses) - 1) * self._contention

    def _pass_time(self) -> None:
        now_s = self._loop.time()
        if self._uses:
            passed_s = (now_s - self._seen_s) / self._slowdown
            for use in self._uses:
                use.left_s -= passed_s
        self._seen_s = now_s

    def _look_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._uses:
            first = min(self._uses, key=lambda use: use.left_s)
            self._timer = self._loop.call_later(max(0.0, first.left_s) * self._slowdown, self._ended, first)

    def _ended(self, use: _Use) -> None:
        self._pass_time()
        self._uses.remove(use)
        self._look_again()
        use.done()
