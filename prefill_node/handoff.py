"""A bounded queue from the compute thread to the event loop that sends."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor, Future

from colm_kernels.native import CancelFlag, Cancelled

_POLL_S = 0.05


class HandoffClosed(Exception):
    """The reader has gone; the writer should stop."""


class Handoff:
    """Carries messages from one thread to one task; the thread waits while `max_items` are unread.

    Create it on the event loop that reads.
    """

    def __init__(self, max_items: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(max_items)
        self.closed = CancelFlag()
        """Set once the reader has gone; it stops the writer inside its kernels."""
        self._items: deque[bytes] = deque()
        self._ready = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    def put(self, item: bytes) -> None:
        """Called by the thread; blocks while the queue is full.

        Raises:
            HandoffClosed: nobody will read it.
        """
        while not self._room.acquire(timeout=_POLL_S):
            if self.closed.is_set():
                break
        if self.closed.is_set():
            raise HandoffClosed
        self._loop.call_soon_threadsafe(self._arrived, item)

    def close(self) -> None:
        """Called by the reader: the thread's next `put` raises."""
        self.closed.set()

    async def items(self) -> AsyncIterator[bytes]:
        """Read until the writer has ended; raises what it failed with, after its items."""
        while True:
            while self._items:
                yield self._items.popleft()
                self._room.release()
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            self._ready.clear()
            await self._ready.wait()

    def start(self, produce: Callable[[], Iterable[bytes]], executor: Executor) -> "Future[None]":
        """Run `produce` in a thread of the executor and put what it yields.

        Returns:
            A future that ends with the thread and not before, whatever becomes of the reader.
        """

        def work() -> None:
            try:
                for item in produce():
                    self.put(item)
            except (HandoffClosed, Cancelled):
                pass

        thread = executor.submit(work)
        thread.add_done_callback(
            lambda _: self._loop.call_soon_threadsafe(self._end, None if thread.cancelled() else thread.exception())
        )
        return thread

    def _arrived(self, item: bytes) -> None:
        self._items.append(item)
        self._ready.set()

    def _end(self, error: BaseException | None) -> None:
        self._ended, self._error = True, error
        self._ready.set()
