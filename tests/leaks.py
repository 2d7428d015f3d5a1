"""What a process has open: a test that compares before and after proves that nothing was left behind."""

import asyncio
import os
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from colm.wire.endpoint import open_channel
from colm.wire.security import Security
from tests.gates import LIMIT_S

_NUMBER = re.compile(r"\d+")


def held() -> Counter[str]:
    """Threads and tasks by name, file descriptors by kind; without the event loop's own threads, which it keeps."""
    names = (thread.name for thread in threading.enumerate())
    tasks = (task for task in asyncio.all_tasks() if task is not asyncio.current_task())
    return Counter(
        [
            *(f"thread {_NUMBER.sub('', name)}" for name in names if not name.startswith("asyncio_")),
            *(
                f"task {_NUMBER.sub('', task.get_name())} of {getattr(task.get_coro(), '__qualname__', '')}"
                for task in tasks
            ),
            *_descriptors(),
        ]
    )


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Fail unless, soon after the block, nothing is open that was not open before it."""
    async with open_channel("127.0.0.1:1", Security()):
        before = held()  # gRPC keeps a thread and its descriptors from its first use on
    yield
    give_up_s = time.monotonic() + LIMIT_S
    while left := held() - before:
        assert time.monotonic() < give_up_s, f"left behind: {dict(left)}"
        await asyncio.sleep(0.02)


def _descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(f"descriptor {os.readlink(f'/proc/self/fd/{name}').partition(':[')[0]}")
        except FileNotFoundError:  # of the listing itself
            continue
    return found
