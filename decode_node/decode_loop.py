"""All running answers, advanced one token at a time, together."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from colm.errors import ColmError, PeerUnavailable
from colm.events import Queued, Token, WaitsFor
from colm.line import BEAT_INTERVAL_S
from decode_node.engine import DecodeEngine
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease
from decode_node.plan import StepPlan
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice, Sampler, choose

logger = logging.getLogger(__name__)


class _Member:
    """An answer in the loop. Its queue holds at most `max_new_tokens` tokens, so a slow reader needs no bound."""

    def __init__(self, answer: RunningAnswer, pages: PageLease) -> None:
        self.answer = answer
        self.pages = pages
        self.outcome: asyncio.Queue[Token | Exception | None] = asyncio.Queue()
        self.is_leaving = False
        self.has_left = False


class DecodeLoop:
    """Owns the decode engine. Create it on the event loop, then keep `run` going as a task.

    The loop holds the pages of every answer that joined until no step can touch them any more.

    Args:
        engine: runs one step at a time in a thread of its own.
        page_line: where the loop holds pages.
        max_batch_size: answers advanced together; more wait their turn.
    """

    def __init__(self, engine: DecodeEngine, page_line: PageLine, *, max_batch_size: int) -> None:
        self._engine = engine
        self._page_line = page_line
        self._max_batch_size = max_batch_size
        self._waiting: deque[_Member] = deque()
        self._active: list[_Member] = []
        self._wake = asyncio.Event()
        self._has_stopped = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    async def events(self, answer: RunningAnswer, pages: PageLease) -> AsyncGenerator[Token | Queued]:
        """Join the batch and yield the answer's tokens; where the batch is full, first that it waits.

        Closing the generator, with `contextlib.aclosing`, ends the answer after the step that may be running.

        Raises:
            PeerUnavailable: the loop has stopped, or stops.
            Exception: whatever the step failed with.
        """
        if self._has_stopped:
            raise _stopped()
        member = _Member(answer, pages)
        self._page_line.retain(pages)
        self._waiting.append(member)
        self._wake.set()
        try:
            if len(self._active) >= self._max_batch_size:
                yield self._queued(member)
            while True:
                try:
                    async with asyncio.timeout(BEAT_INTERVAL_S):
                        item = await member.outcome.get()
                except TimeoutError:
                    if member in self._waiting:
                        yield self._queued(member)
                    continue
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            member.is_leaving = True
            self._wake.set()

    async def run(self) -> None:
        """Advance whoever is there, for ever; cancel the task to stop."""
        try:
            while True:
                self._wake.clear()
                self._admit_and_dismiss()
                if self._active:
                    await self._step(list(self._active))
                else:
                    await self._wake.wait()
        finally:
            self._has_stopped = True
            # Blocks until the running step has ended: only then does it no longer write.
            self._thread.shutdown(wait=True)
            for member in (*self._waiting, *self._active):
                self._dismiss(member, _stopped())

    def _queued(self, member: _Member) -> Queued:
        return Queued(waits_for=WaitsFor.BATCH, num_ahead=self._waiting.index(member))

    def _admit_and_dismiss(self) -> None:
        for member in (*self._waiting, *self._active):
            if member.is_leaving:
                self._dismiss(member, None)
        self._waiting = deque(member for member in self._waiting if not member.has_left)
        self._active = [member for member in self._active if not member.has_left]
        while self._waiting and len(self._active) < self._max_batch_size:
            self._active.append(self._waiting.popleft())

    async def _step(self, members: Sequence[_Member]) -> None:
        rows = [(member, member.answer.next_row()) for member in members]
        rows.sort(key=lambda pair: -pair[1].num_chains)
        members, plan = [member for member, _ in rows], StepPlan(tuple(row for _, row in rows))
        samplers = [member.answer.sampler for member in members]
        try:
            choices = await asyncio.wrap_future(self._thread.submit(self._compute, plan, samplers))
        except Exception as err:
            logger.exception("decode.step failed batch=%d", len(members))
            for member in members:
                self._dismiss(member, err)
            return
        for member, choice in zip(members, choices, strict=True):
            if isinstance(choice, Choice):
                self._advance(member, choice)
            else:
                self._dismiss(member, choice)

    def _advance(self, member: _Member, choice: Choice) -> None:
        try:
            member.outcome.put_nowait(member.answer.advance(choice))
        except Exception as err:
            logger.exception("decode.advance failed")
            self._dismiss(member, err)
            return
        if member.answer.finish_reason is not None:
            self._dismiss(member, None)

    def _compute(self, plan: StepPlan, samplers: Sequence[Sampler]) -> list[Choice | ColmError]:
        return choose(samplers, self._engine.step(plan))

    def _dismiss(self, member: _Member, error: Exception | None) -> None:
        """No step includes the member from here on."""
        if not member.has_left:
            member.has_left = True
            self._page_line.release(member.pages)
            member.outcome.put_nowait(error)


def _stopped() -> PeerUnavailable:
    return PeerUnavailable("this decode node stops; submit the request again")
