"""All running answers, advanced one token at a time, together."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from colm.errors import ColmError
from colm.events import Token
from decode_node.engine import DecodeEngine
from decode_node.sampler import Choice, choose
from decode_node.sequence import Sequence as Answer

logger = logging.getLogger(__name__)


class _Member:
    """An answer in the loop. Its queue holds at most `max_new_tokens` tokens, so a slow reader needs no bound."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.outcome: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()
        self.leaving = False
        self.left = asyncio.Event()


class DecodeLoop:
    """Owns the decode engine. Create it on the event loop, then keep `run` going as a task.

    Args:
        engine: runs one step at a time in a thread of its own.
        max_batch_size: answers advanced together; more wait their turn.
    """

    def __init__(self, engine: DecodeEngine, *, max_batch_size: int) -> None:
        self._engine = engine
        self._max_batch_size = max_batch_size
        self._waiting: deque[_Member] = deque()
        self._active: list[_Member] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    async def tokens(self, answer: Answer) -> AsyncGenerator[Token]:
        """Join the batch and yield the answer's tokens.

        Once this generator is closed, with `contextlib.aclosing`, the engine no longer touches the answer's pages.
        """
        member = _Member(answer)
        self._waiting.append(member)
        self._wake.set()
        try:
            while (item := await member.outcome.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            member.leaving = True
            self._wake.set()
            await asyncio.shield(member.left.wait())

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
            self._thread.shutdown(wait=True)
            for member in (*self._waiting, *self._active):
                self._dismiss(member, asyncio.CancelledError("the decode node stops"))

    def _admit_and_dismiss(self) -> None:
        for member in [member for member in (*self._waiting, *self._active) if member.leaving]:
            self._dismiss(member, None)
        self._waiting = deque(member for member in self._waiting if not member.left.is_set())
        self._active = [member for member in self._active if not member.left.is_set()]
        while self._waiting and len(self._active) < self._max_batch_size:
            self._active.append(self._waiting.popleft())

    async def _step(self, members: Sequence[_Member]) -> None:
        answers = [member.answer for member in members]
        step = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, answers)
        try:
            choices = await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait([step])
            raise
        except Exception as err:
            logger.exception("decode.step failed batch=%d", len(members))
            for member in members:
                self._dismiss(member, err)
            return
        for member, choice in zip(members, choices, strict=True):
            if isinstance(choice, Choice):
                member.outcome.put_nowait(member.answer.advance(choice))
                if member.answer.finish_reason is not None:
                    self._dismiss(member, None)
            else:
                self._dismiss(member, choice)

    def _compute(self, answers: Sequence[Answer]) -> list[Choice | ColmError]:
        logits_RV = self._engine.step([answer.step_input() for answer in answers])
        return choose([answer.sampler for answer in answers], logits_RV)

    def _dismiss(self, member: _Member, error: BaseException | None) -> None:
        if not member.left.is_set():
            member.left.set()
            member.outcome.put_nowait(error)
