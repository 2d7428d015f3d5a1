"""Who waits, who takes part, who leaves, and what the next step computes. No tensors, no asyncio, no threads.

An answer goes one way, and may leave from anywhere:

    waiting -> active -> out          no step holds it as it leaves: it is out at once
               active -> leaving -> out    a step does: it is out when that step has ended

Whoever is out is in no step any more, so nothing writes into its pages for it.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from decode_node.plan import PlanRow, StepPlan


class Answer(Hashable, Protocol):
    """What the scheduler asks of those who take part. They are told apart by hash and equality."""

    def next_row(self) -> PlanRow:
        """What it reads in the next step."""


A = TypeVar("A", bound=Answer)


@dataclass(frozen=True, slots=True)
class Step(Generic[A]):
    """A step that has begun."""

    answers: tuple[A, ...]
    """Whose row of the plan is whose, in this order."""
    plan: StepPlan


class Scheduler(Generic[A]):
    """Every active answer takes part in every step with the row it asks for; first come, first served.

    Args:
        max_batch_size: answers active at once; more wait their turn.
    """

    def __init__(self, *, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size} must be at least 1")
        self._max_batch_size = max_batch_size
        # Dicts of no values: sets in order of coming.
        self._waiting: dict[A, None] = {}
        self._active: dict[A, None] = {}
        self._leaving: set[A] = set()
        self._step: Step[A] | None = None

    def join(self, answer: A) -> None:
        """Wait for a place in the next step that has one."""
        assert not self._holds(answer), "an answer that is here already"
        self._waiting[answer] = None

    def num_ahead(self, answer: A) -> int | None:
        """How many who wait for a place will get one before it; None where it has one, or has one in the next step."""
        if answer not in self._waiting:
            return None
        place = list(self._waiting).index(answer) - (self._max_batch_size - len(self._active))
        return place if place >= 0 else None

    def leave(self, answer: A) -> bool:
        """Take part in no further step; nothing where it leaves or has left already.

        Returns:
            Whether it is out with this word. Where not, `end_step` says so.
        """
        if answer in self._waiting:
            del self._waiting[answer]
            return True
        if answer not in self._active:
            return False
        del self._active[answer]
        if self._step is None or answer not in self._step.answers:
            return True
        self._leaving.add(answer)
        return False

    def begin_step(self) -> Step[A] | None:
        """Admit who has a place now, and plan a step of all who are active; None where nobody is."""
        assert self._step is None, "a step is running"
        while self._waiting and len(self._active) < self._max_batch_size:
            first = next(iter(self._waiting))
            del self._waiting[first]
            self._active[first] = None
        if self._active:
            rows = sorted(((a, a.next_row()) for a in self._active), key=lambda pair: pair[1].num_chains, reverse=True)
            self._step = Step(tuple(answer for answer, _ in rows), StepPlan(tuple(row for _, row in rows)))
        return self._step

    def end_step(self) -> list[A]:
        """The step has ended, well or not.

        Returns:
            Who is out with it: those who left while it ran.
        """
        assert self._step is not None, "no step is running"
        out = [answer for answer in self._step.answers if answer in self._leaving]
        self._step = None
        self._leaving.clear()
        return out

    def close(self) -> list[A]:
        """No step runs, and none will.

        Returns:
            Who is out with it: everybody.
        """
        out = [*self._waiting, *self._active, *self._leaving]
        self._waiting.clear()
        self._active.clear()
        self._leaving.clear()
        self._step = None
        return out

    def check_integrity(self) -> None:
        """Everybody is in one place, and whoever a running step holds is not out; true after every call."""
        places = (self._waiting.keys(), self._active.keys(), self._leaving)
        assert sum(map(len, places)) == len(set().union(*places)), "an answer in two places"
        assert len(self._active) <= self._max_batch_size, "more are active than the batch holds"
        in_step = set() if self._step is None else set(self._step.answers)
        assert in_step <= self._active.keys() | self._leaving, "a step with somebody who is out"
        assert in_step >= self._leaving, "somebody stays for a step that is not his"

    def _holds(self, answer: A) -> bool:
        return answer in self._waiting or answer in self._active or answer in self._leaving
