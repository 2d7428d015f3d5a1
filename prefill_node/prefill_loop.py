"""The engine's thread: one prompt at a time, in the order of asking."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from colm.line import Beat, Line
from prefill_node.handoff import Handoff

# Enough to keep the wire busy while the next tile is computed, little enough to notice a slow reader.
_MESSAGES_IN_FLIGHT = 8


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """How busy the node is."""

    num_active: int
    num_queued: int


class PrefillLoop:
    """Runs one job at a time. Lives on one event loop.

    A job holds the engine until its thread has ended: a reader that leaves only asks it to.

    Args:
        max_queued: jobs that may wait; the next is refused.
    """

    def __init__(self, *, max_queued: int) -> None:
        self._events = asyncio.get_running_loop()
        self._line = Line("this prefill node", max_waiting=max_queued)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefill")
        self._running: tuple[Handoff, Future[None]] | None = None

    @property
    def load(self) -> PrefillLoad:
        """Jobs that run, and that wait."""
        return PrefillLoad(num_active=int(self._running is not None), num_queued=len(self._line))

    async def begin(self, job: Callable[[Handoff], Iterable[bytes]], beat: Beat) -> Handoff:
        """Wait for the job's turn, then run it in the engine's thread.

        Args:
            job: yields messages, and ends soon after the handoff has been closed.
            beat: told of the wait.

        Returns:
            Where to read the messages; close it to end the job early.

        Raises:
            CapacityExceeded: too many wait already.
        """
        return await self._line.turn(lambda: self._start(job), beat)

    async def stop(self) -> None:
        """End the running job and the thread."""
        if self._running is not None:
            self._running[0].close()
        await asyncio.to_thread(self._executor.shutdown)

    def _start(self, job: Callable[[Handoff], Iterable[bytes]]) -> Handoff | None:
        if self._running is not None:
            return None
        handoff = Handoff(_MESSAGES_IN_FLIGHT)
        thread = handoff.start(lambda: job(handoff), self._executor)
        self._running = handoff, thread
        thread.add_done_callback(lambda _: self._events.call_soon_threadsafe(self._ended))
        return handoff

    def _ended(self) -> None:
        self._running = None
        self._line.look_again()
