"""Ray Serve is asked for one replica at a time, in order, and again if no answer comes. Serve itself is scripted."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayError

from cluster.replicas import lender as lender_module
from cluster.replicas.lender import ServeLender
from colm.errors import CapacityExceeded, PeerUnavailable
from colm.nodes import Role
from tests.gates import settle

Grant = tuple[str, str]


class ScriptedHandle:
    """A deployment handle whose `lease` calls are answered by the test."""

    def __init__(self) -> None:
        self.calls: list[ScriptedCall] = []
        self.lease = self

    def options(self, *, stream: bool) -> "ScriptedHandle":
        assert stream
        return self

    def remote(self, again: bool) -> "ScriptedCall":
        self.calls.append(ScriptedCall(again))
        return self.calls[-1]


class ScriptedCall:
    """One `lease` call."""

    def __init__(self, again: bool) -> None:
        self.again = again
        self.answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self.granted: list[Grant] = []
        self.is_cancelled = False

    async def __anext__(self) -> Grant:
        granted = await self.answer
        self.answer = asyncio.get_running_loop().create_future()
        self.granted.append(granted)
        return granted

    def cancel(self) -> None:
        self.is_cancelled = True


class Borrower:
    """Somebody who asks, holds and gives back."""

    def __init__(self, lender: ServeLender, refused_by: Collection[str] = ()) -> None:
        self.told: list[int] = []
        self.granted: Grant | None = None
        self.may_leave = asyncio.Event()
        self.task = asyncio.create_task(self._borrow(lender, refused_by))

    async def _borrow(self, lender: ServeLender, refused_by: Collection[str]) -> None:
        async def beat(num_ahead: int) -> None:
            self.told.append(num_ahead)

        async with lender.lease(beat, refused_by=refused_by) as self.granted:
            await self.may_leave.wait()


@pytest.fixture
def handle() -> ScriptedHandle:
    return ScriptedHandle()


@asynccontextmanager
async def coming(lender: ServeLender, handle: ScriptedHandle) -> AsyncIterator[Callable[[], Borrower]]:
    """Borrowers come when the function is called; at the end of the block no call is open any more."""
    came: list[Borrower] = []

    def borrower(refused_by: Collection[str] = ()) -> Borrower:
        came.append(Borrower(lender, refused_by))
        return came[-1]

    yield borrower
    for each in came:
        each.task.cancel()
    await asyncio.gather(*(each.task for each in came), return_exceptions=True)
    lender.close()
    assert all(call.is_cancelled for call in handle.calls)


@pytest.fixture
async def come(handle: ScriptedHandle) -> AsyncIterator[Callable[[], Borrower]]:
    async with coming(ServeLender(handle, Role.PREFILL, max_waiting=2, is_alone=False), handle) as borrower:
        yield borrower


@pytest.fixture
async def come_alone(handle: ScriptedHandle) -> AsyncIterator[Callable[[], Borrower]]:
    async with coming(ServeLender(handle, Role.PREFILL, max_waiting=2, is_alone=True), handle) as borrower:
        yield borrower


async def grant(call: ScriptedCall, address: str, lease_id: str) -> None:
    call.answer.set_result((address, lease_id))
    await settle()


async def leave(borrower: Borrower) -> None:
    borrower.may_leave.set()
    await borrower.task
    await settle()


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
        while borrower.granted is None:
            await asyncio.sleep(0.001)
            if not handle.calls[-1].answer.done():
                handle.calls[-1].answer.set_result(("host:1", "lease"))
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


async def test_a_replica_that_refused_is_held_until_serve_has_found_another(
    handle: ScriptedHandle, come: Callable[..., Borrower]
) -> None:
    """Serve weighs replicas by their calls, and would name the one that has just refused for ever."""
    borrower = come(["host:1"])
    await settle()
    for number in range(2):
        await grant(handle.calls[number], "host:1", f"lease-{number}")
        assert borrower.granted is None
        assert not handle.calls[number].is_cancelled
    await grant(handle.calls[2], "host:2", "lease")
    assert borrower.granted == ("host:2", "lease")
    assert [call.is_cancelled for call in handle.calls] == [True, True, False]


async def test_serve_is_asked_for_another_replica_so_many_times(
    handle: ScriptedHandle, come: Callable[..., Borrower]
) -> None:
    borrower = come(["host:1"])
    await settle()
    while not borrower.task.done():
        await grant(handle.calls[-1], "host:1", "lease")
    with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
        await borrower.task
    assert len(handle.calls) == lender_module.MAX_PASSED_OVER


async def test_another_replica_is_not_waited_for(
    handle: ScriptedHandle, come: Callable[..., Borrower], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lender_module, "BEAT_INTERVAL_S", 0.001)
    borrower = come(["host:1"])
    with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
        await asyncio.wait_for(borrower.task, 60)
    (call,) = handle.calls
    assert call.is_cancelled


async def test_whoever_was_refused_elsewhere_does_not_join_a_line(
    handle: ScriptedHandle, come: Callable[..., Borrower]
) -> None:
    come(), come()
    await settle()
    with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
        await asyncio.wait_for(come(["host:1"]).task, 60)
    assert len(handle.calls) == 1


async def test_a_kept_replica_is_not_lent_to_whom_it_refused(
    handle: ScriptedHandle, come_alone: Callable[..., Borrower]
) -> None:
    first = come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    await leave(first)
    await grant(handle.calls[0], "host:1", "kept")
    refused = come_alone(["host:1"])
    await settle()
    await grant(handle.calls[1], "host:2", "lease")
    assert refused.granted == ("host:2", "lease")
    kept = come_alone()
    await settle()
    assert kept.granted == ("host:1", "kept")


async def test_the_line_is_bounded(come: Callable[[], Borrower]) -> None:
    for _ in range(3):
        come()
    await settle()
    with pytest.raises(CapacityExceeded, match="2 requests wait for a prefill node already"):
        await come().task


@pytest.mark.parametrize("num_ticks", range(8))
async def test_who_gives_up_as_the_grant_comes_leaves_no_call_open(
    handle: ScriptedHandle, come: Callable[[], Borrower], num_ticks: int
) -> None:
    """Bug: a lease that was granted in the same moment stayed open until it expired."""
    borrower = come()
    await settle()
    handle.calls[0].answer.set_result(("host:1", "lease"))
    for _ in range(num_ticks):
        await asyncio.sleep(0)
    borrower.task.cancel()
    await settle()
    assert handle.calls[0].is_cancelled


async def test_a_lender_that_is_not_alone_gives_back_at_once(
    handle: ScriptedHandle, come: Callable[[], Borrower]
) -> None:
    first = come()
    await settle()
    await grant(handle.calls[0], "host:1", "lease")
    await leave(first)
    assert (handle.calls[0].again, handle.calls[0].is_cancelled) == (False, True)


async def test_a_lender_that_is_alone_has_the_next_lease_in_hand(
    handle: ScriptedHandle, come_alone: Callable[[], Borrower]
) -> None:
    """Bug: every request asked Serve anew, which took it milliseconds, twice."""
    first = come_alone()
    await settle()
    assert handle.calls[0].again
    await grant(handle.calls[0], "host:1", "first")
    await leave(first)
    await grant(handle.calls[0], "host:1", "second")
    second = come_alone()
    await settle()
    assert second.granted == ("host:1", "second")
    assert len(handle.calls) == 1


async def test_a_call_that_is_kept_serves_one_at_a_time(
    handle: ScriptedHandle, come_alone: Callable[[], Borrower]
) -> None:
    first = come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    await leave(first)
    await grant(handle.calls[0], "host:1", "second")
    second, third = come_alone(), come_alone()
    await settle()
    assert second.granted == ("host:1", "second")
    assert third.granted is None
    await grant(handle.calls[1], "host:2", "third")
    assert third.granted == ("host:2", "third")


async def test_whoever_asks_serve_is_given_what_another_leaves(
    handle: ScriptedHandle, come_alone: Callable[[], Borrower]
) -> None:
    """A replica that takes one prompt at a time goes from one to the next without Serve."""
    first, second = come_alone(), come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    assert len(handle.calls) == 2
    await leave(first)
    await grant(handle.calls[0], "host:1", "second")
    assert second.granted == ("host:1", "second")
    assert [call.is_cancelled for call in handle.calls] == [False, True]


async def test_a_lease_whose_use_failed_is_not_followed_by_another(
    handle: ScriptedHandle, come_alone: Callable[[], Borrower]
) -> None:
    first = come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    first.task.cancel()
    await settle()
    assert handle.calls[0].is_cancelled


async def test_a_replica_that_others_use_is_not_kept(
    handle: ScriptedHandle, come_alone: Callable[[], Borrower]
) -> None:
    """Serve weighs the replicas by their calls; one that nobody uses would weigh too."""
    first, second = come_alone(), come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    await grant(handle.calls[1], "host:1", "second")
    await leave(first)
    assert [call.is_cancelled for call in handle.calls] == [True, False]
    await leave(second)
    assert not handle.calls[1].is_cancelled


async def test_a_kept_call_that_breaks_is_not_lent(handle: ScriptedHandle, come_alone: Callable[[], Borrower]) -> None:
    first = come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    await leave(first)
    handle.calls[0].answer.set_exception(RayError("it died"))
    await settle()
    second = come_alone()
    await settle()
    await grant(handle.calls[1], "host:2", "second")
    assert second.granted == ("host:2", "second")


async def test_a_call_that_is_kept_ends_with_its_term(
    handle: ScriptedHandle, come_alone: Callable[[], Borrower], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that Serve stops gets its leases back before Serve kills it."""
    monkeypatch.setattr(lender_module, "_TERM_S", 0.01)
    first = come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    first.may_leave.set()
    async with asyncio.timeout(60):
        while not handle.calls[0].is_cancelled:
            await asyncio.sleep(0.001)
    assert first.task.done()


async def test_a_call_whose_term_has_ended_in_use_is_not_kept(
    handle: ScriptedHandle, come_alone: Callable[[], Borrower], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lender_module, "_TERM_S", 0.0)
    first = come_alone()
    await settle()
    await grant(handle.calls[0], "host:1", "first")
    assert not handle.calls[0].is_cancelled
    await leave(first)
    assert handle.calls[0].is_cancelled


ACTIONS = ("come", "come", "grant", "grant", "grant", "leave", "leave", "give up", "break")


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), min_size=20, max_size=60))
def test_no_call_is_used_twice_or_left_open_and_nobody_waits_for_a_lease_in_hand(
    actions: list[tuple[str, int]],
) -> None:
    """Any order of borrowers that come, leave and give up, and of calls that grant a lease and break."""

    async def act() -> None:
        handle = ScriptedHandle()
        lender = ServeLender(handle, Role.PREFILL, max_waiting=len(actions), is_alone=True)
        lease_ids = (f"lease {number}" for number in itertools.count())
        async with coming(lender, handle) as come:
            came: list[Borrower] = []
            for action, choice in actions:
                calls = [call for call in handle.calls if not (call.is_cancelled or call.answer.done())]
                present = [borrower for borrower in came if not borrower.task.done()]
                holding = [borrower for borrower in present if borrower.granted is not None]
                match action:
                    case "come":
                        came.append(come())
                    case "grant" if calls:
                        call = calls[choice % len(calls)]
                        address = call.granted[-1][0] if call.granted else f"host:{choice % 2}"
                        if not (call.granted and holds(holding, call)):
                            call.answer.set_result((address, next(lease_ids)))
                    case "leave" if holding:
                        holding[choice % len(holding)].may_leave.set()
                    case "give up" if present:
                        present[choice % len(present)].task.cancel()
                    case "break" if calls:
                        broken = calls[choice % len(calls)].answer
                        broken.set_exception(RayError("it died"))
                        broken.exception()  # or asyncio complains where nobody awaits it any more
                await settle()
                check(handle, came)

    asyncio.run(act())


def holds(borrowers: list[Borrower], call: ScriptedCall) -> bool:
    return any(borrower.granted in call.granted for borrower in borrowers)


def check(handle: ScriptedHandle, came: list[Borrower]) -> None:
    present = [borrower for borrower in came if not borrower.task.done()]
    held = [borrower.granted for borrower in present if borrower.granted is not None]
    assert len(set(held)) == len(held)
    opened = [call for call in handle.calls if not call.is_cancelled]
    unused = [call for call in opened if call.granted and not holds(present, call)]
    assert len({call.granted[0][0] for call in unused}) == len(unused)
    num_asking = sum(not call.granted for call in opened)
    assert num_asking == (len(held) < len(present))
    taken = [borrower.granted for borrower in came]
    assert not num_asking or all(call.granted[-1] in taken for call in unused)
    assert sum(holds(present, call) for call in opened) == len(held)


async def test_a_lender_that_is_not_alone_any_more_gives_back_what_it_keeps(handle: ScriptedHandle) -> None:
    lender = ServeLender(handle, Role.PREFILL, max_waiting=2, is_alone=True)
    async with coming(lender, handle) as come:
        first = come()
        await settle()
        await grant(handle.calls[0], "host:1", "first")
        await leave(first)
        assert not handle.calls[0].is_cancelled
        lender.set_alone(True)
        assert not handle.calls[0].is_cancelled
        lender.set_alone(False)
        assert handle.calls[0].is_cancelled
