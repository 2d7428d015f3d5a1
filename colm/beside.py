"""Work beside a block of code, no longer than the block."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self


class Beside:
    """Runs `work` as a task while the block runs. The block's end cancels it, and its error ends the block.

    Where the block must not be broken off, as in the middle of a write to gRPC, which would leave its call without an
    end, it holds the error off until then.
    """

    def __init__(self, work: Coroutine[None, None, None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._is_held_off = self._has_cancelled = False

    async def __aenter__(self) -> Self:
        block = asyncio.current_task()
        assert block is not None, "only in a task"
        self._block = block
        self._task = asyncio.create_task(self._work)
        self._task.add_done_callback(self._note_end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._task.done():
            self._task.remove_done_callback(self._note_end)
            self._task.cancel()
            await asyncio.wait([self._task])
        # Where somebody else has cancelled the block too, that is what it ends with.
        if self._error not in (None, err) and (not self._has_cancelled or not self._block.uncancel()):
            assert self._error is not None
            raise self._error from self._error.__cause__

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Let the work's error wait for the end of a piece of the block."""
        self._is_held_off = True
        try:
            yield
        finally:
            self._is_held_off = False
        if self._error is not None:
            raise self._error

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._error = error
        if not self._is_held_off:
            self._has_cancelled = True
            self._block.cancel()
