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
    contention: float
    done: Callable[[], None]


class Cores:
    """Processor sharing: beside n other users, a user takes 1 + n * contention times as long as alone.

    A contention of 1 adds the users' work up, as of engines whose threads use all cores; 0 is cores enough for all.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._uses: list[_Use] = []
        self._seen_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def use(self, work_s: float, contention: float, done: Callable[[], None]) -> None:
        """Work for so long as it takes alone, and say when it is done."""
        self._pass_time()
        self._uses.append(_Use(work_s, contention, done))
        self._look_again()

    def _slowdown(self, use: _Use) -> float:
        return 1 + (len(self._uses) - 1) * use.contention

    def _pass_time(self) -> None:
        now_s = self._loop.time()
        for use in self._uses:
            use.left_s -= (now_s - self._seen_s) / self._slowdown(use)
        self._seen_s = now_s

    def _look_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._uses:
            after_s, _, first = min((use.left_s * self._slowdown(use), n, use) for n, use in enumerate(self._uses))
            self._timer = self._loop.call_later(max(0.0, after_s), self._ended, first)

    def _ended(self, use: _Use) -> None:
        self._pass_time()
        self._uses.remove(use)
        self._look_again()
        use.done()


class SharedProcessor:
    """One node's part of cores that others use as well.

    Args:
        cores: of all.
        contention: of this node's steps.
    """

    is_shared = True

    def __init__(self, cores: Cores, contention: float) -> None:
        self._cores = cores
        self._contention = contention

    def run(self, steps_s: Sequence[float], done: Callable[[], None]) -> None:
        """See `Processor`."""
        self._cores.use(sum(steps_s), self._contention, done)
