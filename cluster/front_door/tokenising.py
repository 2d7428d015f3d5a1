"""What stands between an upload and its token ids: few threads, and a bound that bytes alone can pass."""

import asyncio
import codecs
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from colm.text.bound import TokenBound

NUM_THREADS = 2
"""More would keep more windows of text in memory, and take cores from the event loop that relays tokens."""

_Result = TypeVar("_Result")


class _Abandoned(Exception):
    """Nobody waits for the result any more. Raised in a worker alone."""


class TokenisingThreads:
    """Runs work that asks, again and again, whether it is still wanted.

    A thread cannot be cancelled, only asked to stop. So a place is free again once its work has really ended, not
    when its caller has gone. Those who wait for a place are the gateway's requests, which are bounded.
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
        """Wait for a place, then for the work.

        Args:
            work: is given a function to call between its steps; what that raises must end the work.
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
            # Shielded, so that it ends when the thread does.
            return await asyncio.shield(ended)
        finally:
            abandoned.set()

    def _ended(self, ended: asyncio.Future[_Result]) -> None:
        self._num_running -= 1
        self._places.release()
        ended.exception()  # or asyncio complains of an error that no caller was left to see


class TextExtent:
    """How much of a text that arrives in chunks must become tokens.

    It reaches from the first to the last character that is not whitespace, since chat templates may trim the
    rest, and leaves out what the tokenizer passes over.

    Args:
        bound: of the tokenizer; None for one that passes over nothing.
    """

    def __init__(self, bound: TokenBound | None = None) -> None:
        self._passed_over = b"" if bound is None else bound.passed_over
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_bytes = 0
        self._num_bytes_of_space = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8, up to the last chunk added."""
        return self._num_bytes

    def add(self, chunk: bytes) -> None:
        """The next chunk; it may end inside a character."""
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
