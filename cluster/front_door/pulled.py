"""From whoever emits events to whoever asks for them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager

from cluster.front_door.placement import Emit
from colm.events import Event


@asynccontextmanager
async def pulled(run: Callable[[Emit], Coroutine[None, None, None]]) -> AsyncIterator[AsyncIterator[Event]]:
    """The events that `run` emits; they end as it ends, with its error if it has one.

    One event at a time is under way, so a slow reader holds `run` up. At the end of the block `run` has ended.
    """
    emitted: asyncio.Queue[Event | None] = asyncio.Queue()
    may_emit = asyncio.Semaphore(1)

    async def emit(event: Event) -> None:
        await may_emit.acquire()
        emitted.put_nowait(event)

    async def events() -> AsyncGenerator[Event]:
        while (event := await emitted.get()) is not None:
            yield event
            may_emit.release()
        running.result()

    def ended(task: asyncio.Task[None]) -> None:
        emitted.put_nowait(None)
        if not task.cancelled():
            task.exception()  # or asyncio complains of an error that no reader was left to see

    running = asyncio.create_task(run(emit))
    running.add_done_callback(ended)
    try:
        async with aclosing(events()) as taken:
            yield taken
    finally:
        running.cancel()
        await asyncio.wait([running])
