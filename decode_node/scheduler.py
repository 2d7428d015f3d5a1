"""Decides which answers take part in the next decode step, and plans it. No tensors, no asyncio, no threads.

An answer moves from left to right, and may leave at any time:

    waiting -> out                         it leaves before it had a place
    waiting -> active -> out               it leaves while no step has it: it is out at once
    waiting -> active -> leaving -> out    it leaves while a step has it: it is out when that step has ended

No step has an answer that is out, so nothing writes into its pages any more.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import Final, Generic, Protocol, TypeVar

from colm.fair_queue import FairQueue
from decode_node.plan import PlanRow, StepPlan
from decode_node.step_budget import StepBudget


class Answer(Hashable, Protocol):
    """An answer, as the scheduler sees it; answers are told apart by hash and equality."""

    @property
    def num_chains(self) -> int:
        """The scale of its next step; it changes between steps only."""

    @property
    def num_left(self) -> int:
        """Tokens that it may still get."""

    @property
    def num_unread(self) -> int:
        """Tokens to read until its next token is chosen: 1 where it goes on, more where a prompt is left."""

    @property
    def num_drafts(self) -> int:
        """Tokens behind them that are drafted, and wait to be verified."""

    def draft_row(self, num_answers: int) -> PlanRow | None:
        """The row of its next draft, at scale 1, with so many answers in the batch; None where it wants none."""

    def next_rows(self, max_tokens: int) -> list[PlanRow]:
        """The rows that it reads in the next step: so many of its unread tokens and drafts, as far as there are."""


A = TypeVar("A", bound=Answer)

FIRST_SHARE: Final = 0.25
"""Of the room for prompts, for the one that came first; as of a prefill node's time."""


@dataclass(frozen=True, slots=True)
class Step(Generic[A]):
    """A step that has begun."""

    answers: tuple[A, ...]
    """Whose each of the plan's rows is; an answer with a prompt to read has several."""
    plan: StepPlan
    drafting: frozenset[A]
    """Those whose row is a draft: chain 1 chooses a token that all chains will verify."""

    def num_tokens(self, answer: A) -> int:
        """How many an answer reads."""
        return sum(len(row.token_ids) for row, of in zip(self.plan.rows, self.answers, strict=True) if of == answer)


class Scheduler(Generic[A]):
    """Every active answer that has read its prompt takes part in every step.

    Places in the batch go to those that wait, one of each client in a round, and keep until the answer leaves.

    What the step's budget leaves is for prompts, in pieces: a share for the one that came first, the rest for those
    with the least left. So a short one waits for no more than the step that runs, unless shorter ones come, and nobody
    waits for ever. What prompts leave is for drafts; those that are cut off have been drafted in vain.

    A step drafts while every answer of more than one chain wants another draft: then chain 1's weights alone are read,
    and answers of one chain take part with the rows that they ask for anyway. As soon as one wants no draft, because it
    has enough, has just come, or never drafts, the next step is everybody's, and verifies the drafts that there are.

    Args:
        max_batch_size: answers active at once; more wait their turn.
        budget: how many tokens a step reads.
    """

    def __init__(self, *, max_batch_size: int, budget: StepBudget) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size} must be at least 1")
        self._max_batch_size = max_batch_size
        self._budget = budget
        self._waiting: FairQueue[A] = FairQueue()
        # A dict without values: a set in the order of arrival.
        self._active: dict[A, None] = {}
        self._leaving: set[A] = set()
        self._step: Step[A] | None = None

    def join(self, answer: A, client: Hashable = None) -> None:
        """Let an answer of a client wait for a place in the batch."""
        assert not self._holds(answer), "an answer that is here already"
        self._waiting.add(answer, client)

    @property
    def answers(self) -> Iterator[A]:
        """Those that wait or are active."""
        return chain(self._waiting, self._active)

    @property
    def active(self) -> Collection[A]:
        """Those that take part in the next step, but for those that leave before."""
        return self._active.keys()

    @property
    def num_waiting(self) -> int:
        """Answers without a place in the batch."""
        return len(self._waiting)

    def num_ahead(self, answer: A) -> int | None:
        """How many answers get a place before this one; None if it has one now, or will in the next step."""
        if answer not in self._waiting:
            return None
        place = self._waiting.index(answer) - (self._max_batch_size - len(self._active))
        return place if place >= 0 else None

    def num_tokens_ahead(self, answer: A) -> int:
        """After how many tokens of each active answer a waiting one gets a place, at the latest if nobody comes."""
        return self.num_tokens_to_end()[answer] - answer.num_left

    def num_tokens_to_end(self) -> dict[A, int]:
        """After how many tokens of each active answer each of `answers` ends, at the latest if nobody comes."""
        ends = {answer: answer.num_left for answer in self._active}
        free = [*ends.values(), *[0] * (self._max_batch_size - len(ends))]
        heapify(free)
        for answer in self._waiting:
            ends[answer] = heappop(free) + answer.num_left
            heappush(free, ends[answer])
        return ends

    def leave(self, answer: A) -> bool:
        """Let an answer take part in no further step; does nothing if it has left before.

        Returns:
            True if this call lets it out. False if a running step has it, and `end_step` will return it, or if it has
            left before.
        """
        if answer in self._waiting:
            self._waiting.remove(answer)
            return True
        if answer not in self._active:
            return False
        del self._active[answer]
        if self._step is None or answer not in self._step.answers:
            return True
        self._leaving.add(answer)
        return False

    def begin_step(self) -> Step[A] | None:
        """Give free places to waiting answers, and plan a step of all active ones; None if there are none."""
        assert self._step is None, "a step is running"
        while self._waiting and len(self._active) < self._max_batch_size:
            first = self._waiting.first
            self._waiting.remove(first)
            self._active[first] = None
        if self._active:
            drafts = self._draft_rows()
            rows = sorted(self._rows(drafts), key=lambda pair: pair[1].num_chains, reverse=True)
            plan = StepPlan(tuple(row for _, row in rows))
            self._step = Step(tuple(answer for answer, _ in rows), plan, frozenset(drafts))
        return self._step

    def end_step(self) -> list[A]:
        """Note that the step has ended, successfully or not.

        Returns:
            The answers that left while it ran, and are out now.
        """
        assert self._step is not None, "no step is running"
        out = [answer for answer in dict.fromkeys(self._step.answers) if answer in self._leaving]
        self._step = None
        self._leaving.clear()
        return out

    def close(self) -> list[A]:
        """Let everybody out; no step runs, and none will.

        Returns:
            All answers that were not out.
        """
        out = [*self._waiting, *self._active, *self._leaving]
        self._waiting.clear()
        self._active.clear()
        self._leaving.clear()
        self._step = None
        return out

    def check_integrity(self) -> None:
        """Assert what holds after every call: an answer is in one place, and none in a running step is out."""
        places = ({*self._waiting}, self._active.keys(), self._leaving)
        assert sum(map(len, places)) == len(set().union(*places)), "an answer in two places"
        assert len(self._active) <= self._max_batch_size, "more are active than the batch holds"
        in_step = set() if self._step is None else set(self._step.answers)
        assert in_step <= self._active.keys() | self._leaving, "a step with somebody who is out"
        assert in_step >= self._leaving, "an answer waits for the end of a step that does not have it"

    def _draft_rows(self) -> dict[A, PlanRow]:
        """The drafts of all answers of more than one chain; none if one of these wants none."""
        drafts = {}
        for answer in self._active:
            if answer.num_chains == 1:
                continue
            if (row := answer.draft_row(len(self._active))) is None:
                return {}
            drafts[answer] = row
        return drafts

    def _rows(self, drafts: Mapping[A, PlanRow]) -> Iterator[tuple[A, PlanRow]]:
        num_tokens = self._num_tokens(drafts)
        for answer in self._active:
            if answer in drafts:
                yield answer, drafts[answer]
            elif answer in num_tokens:
                yield from ((answer, row) for row in answer.next_rows(num_tokens[answer]))

    def _num_tokens(self, drafts: Mapping[A, PlanRow]) -> dict[A, int]:
        """How many tokens each answer reads that takes part, within the budget."""
        num_tokens = {answer: 1 for answer in self._active if answer in drafts or answer.num_unread == 1}
        going = [answer for answer in num_tokens if answer not in drafts]
        prompts = [answer for answer in self._active if answer not in num_tokens]
        room = self._budget.tokens(len(num_tokens)) - len(num_tokens)

        def give(answer: A, wanted: int) -> None:
            nonlocal room
            if given := min(room, wanted):
                num_tokens[answer] = num_tokens.get(answer, 0) + given
                room -= given

        if prompts:
            first = prompts[0]
            give(first, min(first.num_unread, max(1, int(FIRST_SHARE * room))))
        for answer in sorted(prompts, key=lambda each: each.num_unread):
            give(answer, answer.num_unread - num_tokens.get(answer, 0))
        for answer in going:
            give(answer, answer.num_drafts)
        return num_tokens

    def _holds(self, answer: A) -> bool:
        return answer in self._waiting or answer in self._active or answer in self._leaving
