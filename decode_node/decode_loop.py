"""Advances all running answers together, step by step."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from colm.errors import ColmError, PeerUnavailable
from colm.events import PrefillProgress, Queued, Token, WaitsFor
from colm.line import BEAT_INTERVAL_S
from colm.scale import Changing, Scale
from decode_node.auto_scale import AutoScale, Load
from decode_node.drafter import StepTimes
from decode_node.engine import DecodeEngine
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease
from decode_node.plan import PlanRow, StepPlan
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice, choose, choose_ids
from decode_node.scheduler import Scheduler, Step
from decode_node.step_budget import StepBudget

logger = logging.getLogger(__name__)

_NUM_RECENT: Final = 64
"""Steps by which a wait is estimated."""


class _Member:
    """An answer in the loop. Its queue holds at most `max_new_tokens` tokens, so a slow reader needs no bound."""

    def __init__(self, answer: RunningAnswer, pages: PageLease, scale: Changing[Scale]) -> None:
        self.answer = answer
        self.pages = pages
        self.scale = scale
        self.num_prompt_tokens = answer.num_unread
        self.outcome: asyncio.Queue[Token | Exception | None] = asyncio.Queue()

    @property
    def num_chains(self) -> int:
        return self.answer.num_chains

    @property
    def num_left(self) -> int:
        return self.answer.num_left

    @property
    def num_unread(self) -> int:
        return self.answer.num_unread

    @property
    def num_drafts(self) -> int:
        return self.answer.num_drafts

    def draft_row(self, num_answers: int) -> PlanRow | None:
        return self.answer.draft_row(num_answers)

    def next_rows(self, max_tokens: int) -> list[PlanRow]:
        return self.answer.next_rows(max_tokens)


@dataclass(slots=True)
class DecodeCounts:
    """What the loop has done since it began."""

    num_steps: int = 0
    num_tokens: Counter[int] = field(default_factory=Counter)
    """That were sampled for answers, by their scale."""
    num_draft_tokens: int = 0
    """That chain 1 chose and all chains verified."""
    num_accepted_tokens: int = 0
    """Those of them that became tokens of answers."""
    steps_s: float = 0.0
    """In which steps ran."""


class DecodeLoop:
    """Owns the decode engine and its thread. Create it on the event loop, then keep `run` going as a task.

    The scheduler decides who takes part in a step. The loop holds an answer's pages until the scheduler says that the
    answer is out.

    Args:
        engine: runs one step at a time in a thread of its own.
        page_line: holds the answers' pages for the loop.
        max_batch_size: answers advanced in one step; more wait their turn.
        budget: how many tokens a step reads.
        auto_scale: decides how many chains those answers use that leave it to the node.
        times: learns what steps take, where answers draft.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        page_line: PageLine,
        *,
        max_batch_size: int,
        budget: StepBudget,
        auto_scale: AutoScale,
        times: StepTimes | None = None,
    ) -> None:
        self._engine = engine
        self.auto_scale = auto_scale
        self._times = times
        self._page_line = page_line
        self.budget = budget
        self._scheduler = Scheduler[_Member](max_batch_size=max_batch_size, budget=budget)
        self._wake = asyncio.Event()
        self._has_stopped = False
        self._recent = deque[tuple[float, float]](maxlen=_NUM_RECENT)
        """Seconds of the last steps, and the tokens that an answer in them got on average; a draft is none yet."""
        self.counts = DecodeCounts()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    async def events(
        self, answer: RunningAnswer, pages: PageLease, scale: Changing[Scale], client: Hashable = None
    ) -> AsyncGenerator[Token | Queued | PrefillProgress]:
        """Join the batch and yield the answer's tokens; while the batch is full, yield `Queued`.

        A prompt that takes long to read is told by `PrefillProgress`.

        Each step makes its tokens at the scale that holds as the step begins.

        Closing the generator, with `contextlib.aclosing`, ends the answer after the step that may be running.

        Raises:
            PeerUnavailable: the loop has stopped, or stops.
            Exception: whatever the step failed with.
        """
        if self._has_stopped:
            raise _stopped()
        member = _Member(answer, pages, scale)
        self._page_line.retain(pages)
        self._scheduler.join(member, client)
        self._wake.set()
        try:
            if (queued := self._queued(member)) is not None:
                yield queued
            while True:
                try:
                    async with asyncio.timeout(BEAT_INTERVAL_S):
                        item = await member.outcome.get()
                except TimeoutError:
                    if (news := self._queued(member) or _progress(member)) is not None:
                        yield news
                    continue
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._leave(member)

    def _queued(self, member: _Member) -> Queued | None:
        """What a member that waits is told; None if it does not."""
        if (num_ahead := self._scheduler.num_ahead(member)) is None:
            return None
        token_s = self.token_s
        wait_s = None if token_s is None else self._scheduler.num_tokens_ahead(member) * token_s
        return Queued(waits_for=WaitsFor.BATCH, num_ahead=num_ahead, estimated_wait_s=wait_s)

    @property
    def mark(self) -> int | None:
        """What each step changes; None without answers."""
        return self.counts.num_steps if any(True for _ in self._scheduler.answers) else None

    @property
    def token_s(self) -> float | None:
        """Seconds from a token of an answer to its next, as in the last steps; None before any was made."""
        num_tokens = sum(made for _, made in self._recent)
        return sum(step_s for step_s, _ in self._recent) / num_tokens if num_tokens else None

    def ends_s(self) -> dict[PageLease, float]:
        """After how many seconds each answer here ends, at the latest, by its pages; none before `token_s` is known."""
        if (token_s := self.token_s) is None:
            return {}
        ends = self._scheduler.num_tokens_to_end()
        return {member.pages: num_tokens * token_s for member, num_tokens in ends.items()}

    async def run(self) -> None:
        """Run step after step, until the task is cancelled."""
        try:
            while True:
                self._wake.clear()
                # Between steps, so that what a step makes has the scale of the rows that it read.
                for member in self._scheduler.answers:
                    member.answer.num_chains = member.scale.value.at(self.auto_scale.level)
                if (step := self._scheduler.begin_step()) is None:
                    self.auto_scale.rest()
                    await self._wake.wait()
                    continue
                await self._run(step)
                for member in self._scheduler.end_step():
                    self._page_line.release(member.pages)
        finally:
            self._has_stopped = True
            # Blocks until the running step has ended: only then does it no longer write.
            self._thread.shutdown(wait=True)
            for member in self._scheduler.close():
                self._page_line.release(member.pages)
                member.outcome.put_nowait(_stopped())

    async def _run(self, step: Step[_Member]) -> None:
        began_s = time.monotonic()
        compute = self._draft if step.plan.only_drafts else self._compute
        try:
            outcomes = await asyncio.wrap_future(self._thread.submit(compute, step))
        except Exception as err:
            logger.exception("decode.step failed batch=%d", len(step.answers))
            for member in dict.fromkeys(step.answers):
                self._end(member, err)
            return
        step_s = time.monotonic() - began_s
        self.counts.steps_s += step_s
        self._note(step, step_s)
        num_before = self.counts.num_tokens.total()
        read = {member: list[Choice | ColmError]() for member in step.answers if member not in step.drafting}
        for member, of_row in zip(step.answers, outcomes, strict=True):
            if member not in step.drafting:
                read[member] += of_row
            elif of_row:
                (outcome,) = of_row
                member.answer.add_draft(outcome if isinstance(outcome, ColmError) else outcome.token_id)
        for member, of_answer in read.items():
            if of_answer:
                self._advance(member, of_answer)
            else:
                member.answer.note_read(step.num_tokens(member))
        num_made = self.counts.num_tokens.total() - num_before
        self._recent.append((step_s, num_made / len({*step.answers})))

    def _note(self, step: Step[_Member], step_s: float) -> None:
        """Learn from how long a step took; of drafts alone, the thread has."""
        if self._times is not None and not step.plan.only_drafts:
            self._times.note(step.plan, step_s)
        is_plain = not step.drafting and all(len(row.token_ids) == row.num_logits == 1 for row in step.plan.rows)
        self.auto_scale.note(
            Load(
                now_s=time.monotonic(),
                num_waiting=self._scheduler.num_waiting + self._page_line.num_waiting,
                num_answers=len(step.plan.rows),
                num_chains=step.plan.rows[0].num_chains,
                plain_s=step_s if is_plain else None,
            )
        )

    def _compute(self, step: Step[_Member]) -> list[list[Choice | ColmError]]:
        """Run a step and sample: for each row, one choice for each of its tokens that gets logits."""
        rows = step.plan.rows
        logits_QV = self._engine.step(step.plan)
        self.counts.num_steps += 1
        of_rows = zip(step.answers, rows, strict=True)
        samplers_Q = [member.answer.sampler for member, row in of_rows for _ in range(row.num_logits)]
        positions_Q = [position for row in rows for position in row.chosen_positions]
        choices = iter(choose(samplers_Q, positions_Q, logits_QV))
        return [list(islice(choices, row.num_logits)) for row in rows]

    def _draft(self, step: Step[_Member]) -> list[list[Choice | ColmError]]:
        """Draft token after token for those of a step, as long as all want another and nobody waits for the next step.

        Between drafts nothing goes through the event loop: it would take as long as a tenth of one. Nobody else touches
        the answers while a step has them.

        Returns:
            Nothing for each row: its answer has the drafts already.
        """
        members, rows = step.answers, [*step.plan.rows]
        while len(rows) == len(members):
            began_s, plan = time.monotonic(), StepPlan(tuple(rows))
            positions = [position for row in rows for position in row.chosen_positions]
            token_ids = choose_ids([member.answer.sampler for member in members], positions, self._engine.step(plan))
            self.counts.num_steps += 1
            for member, token_id in zip(members, token_ids, strict=True):
                member.answer.add_draft(token_id)
            if self._times is not None:
                self._times.note(plan, time.monotonic() - began_s)
            if self._scheduler.num_waiting:
                break
            rows = [row for member in members if (row := member.draft_row(len(members))) is not None]
        return [[] for _ in members]

    def _advance(self, member: _Member, outcomes: Sequence[Choice | ColmError]) -> None:
        answer = member.answer
        num_draft_tokens, num_accepted_tokens = answer.num_draft_tokens, answer.num_accepted_tokens
        try:
            tokens = answer.advance(outcomes)
        except Exception as err:
            logger.exception("decode.advance failed")
            self._end(member, err)
            return
        self.counts.num_tokens[answer.num_chains] += len(tokens)
        self.counts.num_draft_tokens += answer.num_draft_tokens - num_draft_tokens
        self.counts.num_accepted_tokens += answer.num_accepted_tokens - num_accepted_tokens
        for token in tokens:
            member.outcome.put_nowait(token)
        if answer.finish_reason is not None or answer.error is not None:
            self._end(member, answer.error)

    def _end(self, member: _Member, error: Exception | None) -> None:
        member.outcome.put_nowait(error)
        self._leave(member)

    def _leave(self, member: _Member) -> None:
        if self._scheduler.leave(member):
            self._page_line.release(member.pages)


def _progress(member: _Member) -> PrefillProgress | None:
    """What a member is told whose prompt is still being read; None if it is not."""
    if member.num_unread == 1:
        return None
    total = member.num_prompt_tokens
    return PrefillProgress(num_tokens_done=total - member.num_unread, num_tokens_total=total)


def _stopped() -> PeerUnavailable:
    return PeerUnavailable("this decode node stops; submit the request again")
