"""Answers that outlive the calls that read them: whoever knows an answer's key may go on reading for a while."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from colm.errors import PeerUnavailable, UnknownAnswer
from colm.events import Event, Finished, ScaleChanged, Token
from decode_node.requests import DecodeJob, Emit

logger = logging.getLogger(__name__)


class Requests(Protocol):
    """Runs requests; `RequestOwner` is the real one."""

    async def run(self, job: DecodeJob, emit: Emit) -> None:
        """See `RequestOwner`."""


class _Answer:
    """A request that runs as a task of its own, and what it has said that may be asked for again.

    That is its tokens, at most `max_new_tokens`; of the other events only those that nobody has read yet, and of each
    kind the newest.
    """

    def __init__(self, job: DecodeJob, requests: Requests) -> None:
        self.job = job
        self.expiry: asyncio.TimerHandle | None = None
        """Ends it, unless a reader comes before."""
        self.is_told = False
        """A reader has heard how the request ended."""
        self.reader = object()
        self._tokens: list[Token] = []
        self._news: deque[Event] = deque()
        self._finished: Finished | None = None
        self._changed = asyncio.Event()
        job.scale.listen(self._tell_scale)
        self.task = asyncio.create_task(requests.run(job, self._emit), name=f"answer-{job.request_id}")
        self.task.add_done_callback(self._ended)

    def has(self, num_tokens: int) -> bool:
        """Whether an answer of that many tokens is the beginning of this one, and the rest is here."""
        num_made = len(self.job.made_token_ids)
        return num_made <= num_tokens <= num_made + len(self._tokens)

    def take(self) -> object:
        """Become the one reader; the one before hears that it is not any more."""
        self.reader = object()
        self._changed.set()
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        return self.reader

    async def events(self, reader: object, num_tokens: int) -> AsyncGenerator[Event]:
        """What is new, and the answer behind its first `num_tokens` tokens; `Finished` once the request holds nothing.

        Raises:
            PeerUnavailable: another reader has come, or the request was cancelled.
            ColmError: whatever the request failed with.
        """
        num_read = num_tokens - len(self.job.made_token_ids)
        while self.reader is reader:
            self._changed.clear()
            if self._news:
                yield self._news.popleft()
            elif num_read < len(self._tokens):
                num_read += 1
                yield self._tokens[num_read - 1]
            elif not self.task.done():
                await self._changed.wait()
            elif self._finished is not None:
                yield self._finished
                self.is_told = True
                return
            else:
                self.is_told = True
                if self.task.cancelled():
                    raise PeerUnavailable("the request was cancelled")
                self.task.result()
        raise PeerUnavailable("another call reads this answer now")

    async def _emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._finished = event
            return
        if isinstance(event, Token):
            self._tokens.append(event)
            self._changed.set()
        else:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        self._news = deque(each for each in self._news if type(each) is not type(event))
        self._news.append(event)
        self._changed.set()

    def _tell_scale(self) -> None:
        scale = self.job.scale.value
        self._tell(ScaleChanged(num_chains=scale.num_chains, min_chains=scale.min_chains))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._changed.set()
        if not task.cancelled():
            task.exception()  # or asyncio complains of an error that no reader was left to get


@dataclass(slots=True)
class HeldCounts:
    """What has become of answers whose reader was lost."""

    num_orphaned: int = 0
    """Readers that left an answer which is held."""
    num_resumed: int = 0
    """Calls that took an answer up."""
    num_expired: int = 0
    """Answers for which nobody came in time."""


class HeldAnswers:
    """Runs requests, each for one reader at a time. Lives on one event loop; `close` it.

    A reader that leaves before the end cancels its request, unless the request has a key: then it goes on, so that
    another reader may come.

    Args:
        requests: runs them.
        orphan_s: seconds that a request with a key is held without a reader.
    """

    def __init__(self, requests: Requests, orphan_s: float) -> None:
        self._requests = requests
        self._orphan_s = orphan_s
        self._running: set[_Answer] = set()
        self._by_key: dict[str, _Answer] = {}
        self.counts = HeldCounts()

    @property
    def num_without_reader(self) -> int:
        """Answers that are held for a reader to come."""
        return sum(answer.expiry is not None for answer in self._by_key.values())

    def __len__(self) -> int:
        """Requests that run, and those that have ended and may still be asked for."""
        return len(self._running | {*self._by_key.values()})

    async def close(self) -> None:
        """Cancel every request, and wait until none runs any more."""
        for key in list(self._by_key):
            self._forget(key)
        for answer in self._running:
            answer.task.cancel()
        await asyncio.gather(*(answer.task for answer in self._running), return_exceptions=True)

    @asynccontextmanager
    async def begin(self, job: DecodeJob, key: str) -> AsyncIterator[AsyncIterator[Event]]:
        """Start a request, and read it as long as the block lasts.

        Args:
            job: the request.
            key: under which it may be resumed; an older one of that key ends. Empty: the request ends with the block.

        Raises:
            PeerUnavailable: another reader has come, or the request was cancelled.
            ColmError: whatever else the request fails with.
        """
        self._forget(key)
        answer = _Answer(job, self._requests)
        self._running.add(answer)
        answer.task.add_done_callback(lambda _: self._running.discard(answer))
        if key:
            self._by_key[key] = answer
        async with self._read(answer, key, len(job.made_token_ids)) as events:
            yield events

    @asynccontextmanager
    async def resume(self, key: str, num_tokens: int) -> AsyncIterator[tuple[DecodeJob, AsyncIterator[Event]]]:
        """Read a request that `begin` has started, behind the first `num_tokens` tokens of its answer.

        Raises:
            UnknownAnswer: there is none of that key, or these tokens are not its beginning.
            ColmError: as `begin`.
        """
        answer = self._by_key.get(key)
        if answer is None or not answer.has(num_tokens):
            raise UnknownAnswer("no answer of that key is held here; submit the request again")
        self.counts.num_resumed += 1
        logger.info("answer.resumed request=%s tokens=%d", answer.job.request_id, num_tokens)
        async with self._read(answer, key, num_tokens) as events:
            yield answer.job, events

    def cancel(self, key: str, request_id: str) -> None:
        """End a request at once; nothing if there is none of that key and id."""
        answer = self._by_key.get(key)
        if answer is not None and answer.job.request_id == request_id:
            self._forget(key)

    def _forget(self, key: str) -> None:
        if (answer := self._by_key.pop(key, None)) is not None:
            self._end(answer)

    @asynccontextmanager
    async def _read(self, answer: _Answer, key: str, num_tokens: int) -> AsyncIterator[AsyncIterator[Event]]:
        reader = answer.take()
        try:
            async with aclosing(answer.events(reader, num_tokens)) as events:
                yield events
        finally:
            if answer.reader is reader:
                self._leave(answer, key)

    def _leave(self, answer: _Answer, key: str) -> None:
        if self._by_key.get(key) is not answer:
            self._end(answer)
        elif answer.is_told or not self._orphan_s:
            self._forget(key)
        else:
            logger.info("answer.orphaned request=%s for_s=%g", answer.job.request_id, self._orphan_s)
            self.counts.num_orphaned += 1
            answer.expiry = asyncio.get_running_loop().call_later(self._orphan_s, self._expire, key)

    def _expire(self, key: str) -> None:
        self.counts.num_expired += 1
        self._forget(key)

    def _end(self, answer: _Answer) -> None:
        answer.task.cancel()
        if answer.expiry is not None:
            answer.expiry.cancel()
