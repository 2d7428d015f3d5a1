"""Threads that tokenise prompts, and a count of the bytes in a text that must become tokens."""

import asyncio
import codecs
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from colm.text.bound import TokenBound

NUM_THREADS = 2
"""Texts tokenised at once. More would hold more text in memory, and take cores from the loop that relays tokens."""

_Result = TypeVar("_Result")


class _Abandoned(Exception):
    """Ends work whose caller has gone. Raised only in a worker thread."""


class TokenisingThreads:
    """Runs work in a few threads; work whose caller has gone stops at its next check.

    A thread cannot be cancelled. So a place is free when its work has ended, not when its caller has gone. Only the
    gateway's requests wait for a place, and their number is bounded.
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenise")
        self._places = asyncio.Semaphore(num_threads)
        self._num_running = 0

    @property
    def num_running(self) -> int:
        """Pieces of work that have not ended, abandoned ones included."""
        return self._num_running

    async def run(self, work: Callable[[Callable[[], None]], _Result]) -> _Result:
        """Wait for a place, run the work in a thread, and return its result.

        Args:
            work: gets a function to call between its steps; an exception from that function must end the work.
        """
        await self._places.acquire()
        abandoned = threading.Event()

        def check() -> None:
            if abandoned.is_set():
                raise _Abandoned

        self._num_running += 1
        ended = asyncio.get_running_loop().run_in_executor(self._threads, work, check)
        ended.add_done_callback(self._ended)
        try:
            # Shielded: the future ends when its thread does, not when the caller is cancelled.
            return await asyncio.shield(ended)
        finally:
            abandoned.set()

    def _ended(self, ended: asyncio.Future[_Result]) -> None:
        self._num_running -= 1
        self._places.release()
        ended.exception()  # marks it as seen: asyncio logs an error that no caller was left to get


class TextExtent:
    """Counts the bytes that must become tokens, in a text that arrives in chunks.

    Whitespace at both ends does not count, since chat templates may trim it. Nor do bytes that the tokenizer passes
    over.

    Args:
        bound: the tokenizer's; None for one that passes over nothing.
    """

    def __init__(self, bound: TokenBound | None = None) -> None:
        self._passed_over = b"" if bound is None else bound.passed_over
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_bytes = 0
        self._num_bytes_of_space = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 that count, of all chunks so far."""
        return self._num_bytes

    def add(self, chunk: bytes) -> None:
        """Add the next chunk; it may end inside a character."""
        text = self._utf8.decode(chunk)
        if not self._num_bytes:
            text = text.lstrip()
        solid = text.rstrip()
        if solid:
            self._num_bytes += self._num_bytes_of_space + self._count(solid)
            self._num_bytes_of_space = 0
        self._num_bytes_of_space += self._count(text[len(solid) :])

    def _count(self, text: str) -> int:
        return len(text.encode().translate(None, self._passed_over))
