"""Prefill nodes at fixed addresses take so many streams each; the one with the least work first, a failed one last."""

import asyncio
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import pytest

from colm.errors import CapacityExceeded, PeerFailed, PeerUnavailable
from decode_node.prefill_pool import PrefillLease, StaticPrefillPool
from tests.clock import FakeClock
from tests.gates import settle


async def no_beat(_: int) -> None:
    pass


def borrow(
    pool: StaticPrefillPool, preferred: str | None = None, num_tokens: int = 1, refused_by: Collection[str] = ()
) -> AbstractAsyncContextManager[PrefillLease]:
    return pool.lease(num_tokens=num_tokens, beat=no_beat, preferred=preferred, refused_by=refused_by)


async def lend(pool: StaticPrefillPool, error: Exception | None = None) -> str:
    """Borrow a node and give it back, with an error where one is given; its address."""
    address = ""
    try:
        async with borrow(pool) as lease:
            address = lease.address
            if error is not None:
                raise error
    except (PeerUnavailable, PeerFailed):
        pass
    return address


async def test_equal_nodes_take_turns() -> None:
    pool = StaticPrefillPool(["a", "b", "c"], FakeClock(), max_streams=1)
    assert [await lend(pool) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize("error", [PeerUnavailable("dead"), PeerFailed("out of memory")])
async def test_a_node_that_failed_is_asked_again_only_after_a_rest(error: Exception) -> None:
    """Bug: the dead node always had the fewest streams, so it was asked again and again beside a healthy one."""
    clock = FakeClock()
    pool = StaticPrefillPool(["dead", "healthy"], clock, max_streams=1)
    assert await lend(pool, error) == "dead"
    assert [await lend(pool) for _ in range(5)] == ["healthy"] * 5
    clock.now_s += 60
    assert {await lend(pool), await lend(pool)} == {"dead", "healthy"}


async def test_a_node_that_holds_the_prompt_already_is_lent_although_it_failed_unless_it_is_busy() -> None:
    pool = StaticPrefillPool(["holder", "other"], FakeClock(), max_streams=1)
    await lend(pool, PeerUnavailable("broke off"))
    async with borrow(pool, "holder") as lease:
        assert lease.address == "holder"
        async with borrow(pool, "holder") as another:
            assert another.address == "other"


async def test_a_dead_node_is_passed_over_although_the_healthy_one_was_busy_all_along() -> None:
    pool = StaticPrefillPool(["dead", "healthy"], FakeClock(), max_streams=1)
    await lend(pool, PeerUnavailable("dead"))
    async with AsyncExitStack() as stack:
        assert (await stack.enter_async_context(borrow(pool))).address == "healthy"
        # Nothing else is free: better a node that may be dead than none.
        assert (await stack.enter_async_context(borrow(pool))).address == "dead"


async def test_each_failure_in_a_row_doubles_the_rest_and_a_success_ends_it() -> None:
    clock = FakeClock()
    pool = StaticPrefillPool(["bad", "good"], clock, max_streams=1)
    assert await lend(pool, PeerUnavailable("")) == "bad"
    clock.now_s += 1.01
    await lend(pool)
    assert await lend(pool, PeerUnavailable("")) == "bad"
    clock.now_s += 1.01
    assert [await lend(pool), await lend(pool)] == ["good", "good"]
    clock.now_s += 1.01
    assert "bad" in [await lend(pool), await lend(pool)]
    assert {await lend(pool), await lend(pool)} == {"bad", "good"}


async def test_a_cancelled_stream_says_nothing_about_its_node() -> None:
    pool = StaticPrefillPool(["a", "b"], FakeClock(), max_streams=1)

    async def hold() -> None:
        async with borrow(pool):
            await asyncio.sleep(60)

    holder = asyncio.create_task(hold())
    await settle()
    holder.cancel()
    await settle()
    assert [await lend(pool) for _ in range(4)] == ["b", "a", "b", "a"]


async def test_the_node_with_the_fewest_tokens_is_lent_first() -> None:
    pool = StaticPrefillPool(["a", "b"], FakeClock(), max_streams=3)
    async with AsyncExitStack() as stack:
        lent = [(await stack.enter_async_context(borrow(pool, None, num))).address for num in (1000, 10, 20, 30, 40)]
        assert lent == ["a", "b", "b", "b", "a"]
    async with borrow(pool, None, 5) as lease, borrow(pool) as other:
        assert {lease.address, other.address} == {"a", "b"}


async def test_a_prompt_that_finds_every_node_full_goes_to_the_next_that_has_room() -> None:
    """Bug: a prompt was bound to the busy node and stayed there while the other node was idle."""
    pool = StaticPrefillPool(["a", "b"], FakeClock(), max_streams=1)
    async with AsyncExitStack() as long, AsyncExitStack() as short:
        assert (await long.enter_async_context(borrow(pool))).address == "a"
        assert (await short.enter_async_context(borrow(pool))).address == "b"
        third = asyncio.create_task(lend(pool))
        await settle()
        assert not third.done()
        await short.aclose()
        assert await third == "b"


async def test_a_node_that_rests_has_no_load_and_the_others_that_of_their_streams() -> None:
    pool = StaticPrefillPool(["dead", "busy", "idle"], FakeClock())
    await lend(pool, PeerUnavailable("dead"))
    async with borrow(pool, "busy"), borrow(pool, "busy"):
        assert pool.loads() == {"busy": 2, "idle": 0}


async def test_the_places_before_the_nodes_are_bounded() -> None:
    pool = StaticPrefillPool(["a"], FakeClock(), max_streams=1, max_waiting=1)
    async with borrow(pool):
        waiting = asyncio.create_task(lend(pool))
        await settle()
        with pytest.raises(CapacityExceeded):
            await lend(pool)
    assert await waiting == "a"


async def test_another_than_those_that_refused_is_lent_at_once_or_none() -> None:
    pool = StaticPrefillPool(["a", "b", "c"], FakeClock(), max_streams=1)
    async with borrow(pool, "a", refused_by=["a"]) as second, borrow(pool, refused_by=["a", second.address]) as third:
        assert {second.address, third.address} == {"b", "c"}
        for refused_by in (["a"], ["a", "b"], ["a", "b", "c"]):
            with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
                await borrow(pool, refused_by=refused_by).__aenter__()
    with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
        await borrow(StaticPrefillPool(["a"], FakeClock()), refused_by=["a"]).__aenter__()


async def test_a_node_that_rests_is_not_another_that_is_free() -> None:
    pool = StaticPrefillPool(["dead", "busy"], FakeClock())
    assert await lend(pool, PeerUnavailable("dead")) == "dead"
    with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
        await borrow(pool, refused_by=["busy"]).__aenter__()


async def test_whoever_was_refused_elsewhere_overtakes_nobody() -> None:
    pool = StaticPrefillPool(["a", "b"], FakeClock(), max_streams=1)
    async with AsyncExitStack() as stack:
        held = [await stack.enter_async_context(borrow(pool)) for _ in range(2)]
        waiting = asyncio.create_task(lend(pool))
        await settle()
        with pytest.raises(CapacityExceeded):
            await borrow(pool, refused_by=[held[0].address]).__aenter__()
        assert not waiting.done()
    await waiting


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prefill node"):
        StaticPrefillPool([], FakeClock())
