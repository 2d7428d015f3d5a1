"""Answers that run while something else is measured beside them, and what their steps took meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Self

from colm.errors import ColmError

Answer = Callable[[Callable[[], None]], Coroutine[Any, Any, object]]
"""Asks for an answer that is longer than anybody waits; calls its argument at each token."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Times between tokens: what they came to, and how many."""

    seconds: float = 0.0
    count: int = 0

    @property
    def mean_s(self) -> float:
        """Not the median: a client that is late reads several tokens at once."""
        return self.seconds / self.count

    def __add__(self, other: "Gaps") -> "Gaps":
        return Gaps(self.seconds + other.seconds, self.count + other.count)

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Self:
        """Between the tokens of one answer."""
        return cls(times_s[-1] - times_s[0], len(times_s) - 1) if times_s else cls()


class RunningAnswers:
    """Answers that are begun with a block and given up with it.

    Args:
        answer: asks for one.
        num_answers: at once.
        now_s: the clock.
    """

    def __init__(self, answer: Answer, num_answers: int, now_s: Callable[[], float]) -> None:
        self._answer = answer
        self._now_s = now_s
        self._times_s: list[list[float]] = [[] for _ in range(num_answers)]
        self._tasks: list[asyncio.Future[object]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.ensure_future(self._answer(self._noted(times_s))) for times_s in self._times_s]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def make(self, num_tokens: int) -> None:
        """Wait until each answer has so many more.

        Raises:
            ColmError: one has ended.
        """
        wanted = [len(times_s) + num_tokens for times_s in self._times_s]
        while any(len(times_s) < count for times_s, count in zip(self._times_s, wanted, strict=True)):
            if any(task.done() for task in self._tasks):
                raise ColmError("an answer has ended that was to run beside others; the machine is too busy")
            await asyncio.sleep(0.01)

    def gaps(self, began_s: float, ended_s: float) -> Gaps:
        """Of all answers, within [began, ended)."""
        inside = ([at_s for at_s in times_s if began_s <= at_s < ended_s] for times_s in self._times_s)
        return sum(map(Gaps.of, inside), Gaps())

    def _noted(self, times_s: list[float]) -> Callable[[], None]:
        return lambda: times_s.append(self._now_s())
