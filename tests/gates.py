"""Timing faults without sleeps: real components stop at a gate until the test opens it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

LIMIT_S = 60.0


async def settle() -> None:
    """Let every task of the loop go on until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


class Gate:
    """A gate, closed at first. Each caller is counted as it arrives."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()
        self.num_arrived = 0

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()
        self.reached.clear()

    async def until_reached(self) -> None:
        """Wait until a caller stands at the gate."""
        assert await asyncio.to_thread(self.reached.wait, LIMIT_S), "nobody came to the gate"

    def pass_through(self) -> None:
        """Wait for the gate to open; the component's thread calls this."""
        self.num_arrived += 1
        self.reached.set()
        assert self._open.wait(LIMIT_S), "the test never opened the gate"


@contextmanager
def gate_before(owner: type, method: str, when: Callable[..., bool] = lambda *_, **__: True) -> Iterator[Gate]:
    """A gate before the calls of a method whose arguments satisfy `when`; it opens as the block ends."""
    gate = Gate()
    original: Callable[..., Any] = getattr(owner, method)

    def gated(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            gate.pass_through()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, gated)
        try:
            yield gate
        finally:
            gate.open()
