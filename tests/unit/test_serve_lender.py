"""Ray Serve is asked for one replica at a time, in order, and again if no answer comes. Serve itself is scripted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import RayError

from cluster.replicas import lender as lender_module
from cluster.replicas.lender import ServeLender
from colm.errors import CapacityExceeded, PeerUnavailable
from colm.nodes import Role
from tests.unit.test_line import settle

Grant = tuple[str, str]


class ScriptedHandle:
    """A deployment handle whose `lease` calls are answered by the test."""

    def __init__(self) -> None:
        self.calls: list[ScriptedCall] = []
        self.lease = self

    def options(self, *, stream: bool) -> "ScriptedHandle":
        assert stream
        return self

    def remote(self) -> "ScriptedCall":
        self.calls.append(ScriptedCall())
        return self.calls[-1]


class ScriptedCall:
    """One `lease` call."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False

    async def __anext__(self) -> Grant:
        return await self.answer

    def cancel(self) -> None:
        self.is_cancelled = True


class Borrower:
    """Somebody who asks, holds and gives back."""

    def __init__(self, lender: ServeLender) -> None:
        self.told: list[int] = []
        self.granted: Grant | None = None
        self.may_leave = asyncio.Event()
        self.task = asyncio.create_task(self._borrow(lender))

    async def _borrow(self, lender: ServeLender) -> None:
        async def beat(num_ahead: int) -> None:
            self.told.append(num_ahead)

        async with lender.lease(beat) as self.granted:
            await self.may_leave.wait()


@pytest.fixture
def handle() -> ScriptedHandle:
    return ScriptedHandle()


@pytest.fixture
async def come(handle: ScriptedHandle) -> AsyncIterator[Callable[[], Borrower]]:
    lender: Any = ServeLender(handle, Role.PREFILL, max_waiting=2)
    came: list[Borrower] = []

    def borrower() -> Borrower:
        came.append(Borrower(lender))
        return came[-1]

    yield borrower
    for each in came:
        each.task.cancel()
    await asyncio.gather(*(each.task for each in came), return_exceptions=True)
    assert all(call.is_cancelled for call in handle.calls)


async def test_a_granted_replica_is_held_until_it_is_given_back(
    handle: ScriptedHandle, come: Callable[[], Borrower]
) -> None:
    borrower = come()
    await settle()
    handle.calls[0].answer.set_result(("host:1", "lease"))
    await settle()
    assert borrower.granted == ("host:1", "lease")
    assert not handle.calls[0].is_cancelled
    borrower.may_leave.set()
    await borrower.task
    assert handle.calls[0].is_cancelled


async def test_only_the_first_asks_and_the_others_know_their_places(
    handle: ScriptedHandle, come: Callable[[], Borrower]
) -> None:
    """Bug: all waiters asked at once, and Serve bound them to replicas that were busy."""
    borrowers = [come() for _ in range(3)]
    await settle()
    assert len(handle.calls) == 1
    assert [borrower.told for borrower in borrowers[1:]] == [[0], [1]]
    handle.calls[0].answer.set_result(("host:1", "first"))
    await settle()
    assert len(handle.calls) == 2
    handle.calls[1].answer.set_result(("host:2", "second"))
    await settle()
    assert [borrower.granted for borrower in borrowers] == [("host:1", "first"), ("host:2", "second"), None]


async def test_no_answer_is_asked_for_again(
    handle: ScriptedHandle, come: Callable[[], Borrower], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a call that Serve had handed to a stopped replica was waited for until the request's deadline."""
    monkeypatch.setattr(lender_module, "BEAT_INTERVAL_S", 0.001)
    borrower = come()
    async with asyncio.timeout(60):
        while len(handle.calls) < 3:
            await asyncio.sleep(0.001)
    monkeypatch.setattr(lender_module, "BEAT_INTERVAL_S", 60.0)
    async with asyncio.timeout(60):
        while not handle.calls[-1].answer.done():
            await asyncio.sleep(0.001)
            if not handle.calls[-1].answer.done():
                handle.calls[-1].answer.set_result(("host:1", "lease"))
    await settle()
    assert borrower.granted == ("host:1", "lease")
    assert all(call.is_cancelled for call in handle.calls[:-1])
    assert set(borrower.told) == {0}


async def test_a_replica_that_died_is_told_and_the_next_may_ask(
    handle: ScriptedHandle, come: Callable[[], Borrower]
) -> None:
    first, second = come(), come()
    await settle()
    handle.calls[0].answer.set_exception(RayError("it died"))
    with pytest.raises(PeerUnavailable, match="no prefill node answered: it died"):
        await first.task
    await settle()
    handle.calls[1].answer.set_result(("host:2", "lease"))
    await settle()
    assert second.granted == ("host:2", "lease")


async def test_who_gives_up_while_asking_leaves_the_word_to_the_next(
    handle: ScriptedHandle, come: Callable[[], Borrower]
) -> None:
    first, second = come(), come()
    await settle()
    first.task.cancel()
    await settle()
    assert handle.calls[0].is_cancelled
    handle.calls[1].answer.set_result(("host:1", "lease"))
    await settle()
    assert second.granted == ("host:1", "lease")


async def test_the_line_is_bounded(come: Callable[[], Borrower]) -> None:
    for _ in range(3):
        come()
    await settle()
    with pytest.raises(CapacityExceeded, match="2 requests wait for a prefill node already"):
        await come().task
