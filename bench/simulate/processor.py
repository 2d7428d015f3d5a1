"""What makes the steps of engines: a processor of one node, or one that several nodes share."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np


class Processor(Protocol):
    """Makes steps one after the other, for each of its users."""

    is_shared: bool
    """Steps may take longer than was said as they began."""

    def run(self, steps_s: Sequence[float], done: Callable[[], None], *, num_answers: int = 0) -> None:
        """Make steps, and say when the last one has ended.

        Args:
            steps_s: what they take alone.
            done: told.
            num_answers: of a decode step; 0 of a prefill's.
        """


class OwnProcessor:
    """Nobody else uses it."""

    is_shared = False

    def run(self, steps_s: Sequence[float], done: Callable[[], None], *, num_answers: int = 0) -> None:  # noqa: ARG002
        """See `Processor`."""
        asyncio.get_running_loop().call_later(sum(steps_s), done)


@dataclass(frozen=True, slots=True)
class Share:
    """What a user and others on the same cores do to each other: it takes 1 + suffers * (their weights) times as long.

    1 and 1 of all adds their work up, as of engines whose threads use all cores; 0 is cores enough for all.
    """

    suffers: float
    weighs: float


_PREFILL: Final = Share(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Contention:
    """How much longer a decode step takes beside a prefill and a prefill beside such steps, as parts of their own time.

    More answers in a step are more work that runs on all threads at once, and a thread that waits for its core has the
    others wait.
    """

    num_answers: tuple[int, ...]
    """Of the steps that were measured, ascending; straight lines between them."""
    decode: tuple[float, ...]
    prefill: tuple[float, ...]

    def share(self, num_answers: int) -> Share:
        """Of a step of so many answers; of none is a prefill's."""
        if not num_answers:
            return _PREFILL
        suffers, weighs = (np.interp(num_answers, self.num_answers, each) for each in (self.decode, self.prefill))
        return Share(float(suffers), float(weighs))


@dataclass(eq=False, slots=True)
class _Use:
    left_s: float
    share: Share
    done: Callable[[], None]


class Cores:
    """Processor sharing; each user's progress is slowed by those who are there, as `Share` says."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._uses: list[_Use] = []
        self._seen_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def use(self, work_s: float, share: Share, done: Callable[[], None]) -> None:
        """Work for so long as it takes alone, and say when it is done."""
        self._pass_time()
        self._uses.append(_Use(work_s, share, done))
        self._look_again()

    def _slowdown(self, use: _Use) -> float:
        return 1 + use.share.suffers * sum(each.share.weighs for each in self._uses if each is not use)

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
        contention: of the nodes' steps.
    """

    is_shared = True

    def __init__(self, cores: Cores, contention: Contention) -> None:
        self._cores = cores
        self._contention = contention

    def run(self, steps_s: Sequence[float], done: Callable[[], None], *, num_answers: int = 0) -> None:
        """See `Processor`."""
        self._cores.use(sum(steps_s), self._contention.share(num_answers), done)
