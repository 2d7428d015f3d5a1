"""Turns a coroutine that emits events into an iterator over them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

_Event = TypeVar("_Event")


@asynccontextmanager
async def pulled(
    run: Callable[[Callable[[_Event], Awaitable[None]]], Coroutine[None, None, None]],
) -> AsyncIterator[AsyncIterator[_Event]]:
    """Run `run` as a task, and iterate over the events that it emits; its error is raised after the last one.

    At most one event waits for the reader, so a slow reader holds `run` up. The end of the block cancels `run` and
    waits until it has ended.
    """
    emitted: asyncio.Queue[_Event | None] = asyncio.Queue()
    may_emit = asyncio.Semaphore(1)

    async def emit(event: _Event) -> None:
        await may_emit.acquire()
        emitted.put_nowait(event)

    async def events() -> AsyncGenerator[_Event]:
        while (event := await emitted.get()) is not None:
            yield event
            may_emit.release()
        running.result()

    def ended(task: asyncio.Task[None]) -> None:
        emitted.put_nowait(None)
        if not task.cancelled():
            task.exception()  # marks it as seen: asyncio logs an error that no reader was left to get

    running = asyncio.create_task(run(emit))
    running.add_done_callback(ended)
    try:
        async with aclosing(events()) as taken:
            yield taken
    finally:
        running.cancel()
        await asyncio.wait([running])
