"""A decode replica asks Ray Serve for the prefill node that it wants until Serve names it; Serve is scripted."""

import asyncio
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager

import pytest

from cluster.replicas import decode, lender
from cluster.replicas.decode import ServePrefillPool
from cluster.replicas.lender import MAX_PASSED_OVER
from colm.errors import CapacityExceeded, PeerUnavailable
from colm.nodes import NodeCounts
from decode_node.prefill_pool import PrefillLease


class TakingTurns:
    """A deployment handle whose replicas lend themselves in turns, and the calls that are open."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.num_open = 0
        self.num_calls = 0
        self.lease = self

    def options(self, *, stream: bool) -> "TakingTurns":
        assert stream
        return self

    def remote(self, again: bool) -> "OneLease":
        assert not again
        self.num_calls += 1
        self.num_open += 1
        self.addresses.append(self.addresses.pop(0))
        return OneLease(self, self.addresses[-1])


class OneLease:
    """An open call."""

    def __init__(self, handle: TakingTurns, address: str) -> None:
        self._handle, self._address = handle, address

    async def __anext__(self) -> tuple[str, str]:
        if self._address == "busy":
            await asyncio.get_running_loop().create_future()
        return self._address, "lease"

    def cancel(self) -> None:
        self._handle.num_open -= 1


async def no_beat(_: int) -> None:
    pass


def pool_of(handle: TakingTurns) -> ServePrefillPool:
    pool = ServePrefillPool(handle, max_waiting=4)
    pool.hear(NodeCounts(num_prefill=3, num_decode=2))
    return pool


def borrow(
    pool: ServePrefillPool, preferred: str | None = None, refused_by: Collection[str] = ()
) -> AbstractAsyncContextManager[PrefillLease]:
    return pool.lease(num_tokens=1, beat=no_beat, preferred=preferred, refused_by=refused_by)


async def lend(pool: ServePrefillPool, preferred: str | None = None, error: Exception | None = None) -> str:
    """Borrow a node and give it back, with an error where one is given; its address."""
    address = ""
    try:
        async with borrow(pool, preferred) as lease:
            address = lease.address
            assert pool.loads()[address] == 1
            if error is not None:
                raise error
    except PeerUnavailable:
        pass
    return address


async def test_the_node_that_is_wanted_is_lent_whichever_serve_names_first() -> None:
    handle = TakingTurns("a", "b", "c")
    pool = pool_of(handle)
    assert [await lend(pool), await lend(pool, "a"), await lend(pool, "c"), await lend(pool)] == ["a", "a", "c", "a"]
    assert pool.loads() == {"a": 0, "c": 0}
    assert handle.num_open == 0


async def test_for_a_wanted_node_that_serve_does_not_name_the_first_that_it_names_is_lent() -> None:
    handle = TakingTurns("a", "b")
    pool = pool_of(handle)
    assert await lend(pool, "gone") == "a"
    assert (handle.num_calls, handle.num_open) == (MAX_PASSED_OVER, 0)


async def test_a_wanted_node_is_not_waited_for_with_another_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lender, "_WANTED_S", 0.001)
    handle = TakingTurns("a", "busy")
    assert await lend(pool_of(handle), "busy") == "a"
    assert (handle.num_calls, handle.num_open) == (2, 0)


async def test_a_node_that_failed_is_known_no_more_until_it_is_lent_again() -> None:
    pool = pool_of(TakingTurns("a", "b"))
    await lend(pool)
    assert await lend(pool, error=PeerUnavailable("gone")) == "b"
    assert pool.loads() == {"a": 0}
    assert await lend(pool, "b") == "b", "the one that has begun with a prompt may have lost a connection alone"
    assert pool.loads() == {"a": 0, "b": 0}


async def test_whoever_was_refused_gets_another_than_those_that_refused_whatever_was_wanted() -> None:
    pool = pool_of(TakingTurns("a", "b", "c"))
    for _ in range(3):
        await lend(pool)
    async with borrow(pool, "b", refused_by=["b"]) as lease:
        assert lease.address == "a"
    with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
        await borrow(pool, "b", refused_by=["a", "b", "c"]).__aenter__()


async def test_a_pool_that_has_become_smaller_knows_that_all_its_nodes_have_refused() -> None:
    """Bug: it took the most that the pool may have, and asked Serve again and again for those that did not run."""
    handle = TakingTurns("a")
    pool = pool_of(handle)
    with pytest.raises(CapacityExceeded):
        await borrow(pool, refused_by=["a"]).__aenter__()
    num_calls = handle.num_calls
    pool.hear(NodeCounts(num_prefill=1, num_decode=2))
    with pytest.raises(CapacityExceeded, match="no other prefill node is free"):
        await borrow(pool, refused_by=["a"]).__aenter__()
    assert (handle.num_calls, handle.num_open) == (num_calls, 0)
    assert num_calls == MAX_PASSED_OVER


async def test_before_it_knows_how_many_nodes_there_are_serve_is_asked() -> None:
    handle = TakingTurns("a", "b")
    async with borrow(ServePrefillPool(handle, max_waiting=4), refused_by=["a"]) as lease:
        assert lease.address == "b"


async def test_the_nodes_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_KNOWN_NODES", 2)
    pool = pool_of(TakingTurns("a", "b", "c"))
    for _ in range(3):
        await lend(pool)
    assert pool.loads() == {"b": 0, "c": 0}


async def test_lengths_of_prompts_that_wait_no_longer_are_forgotten() -> None:
    """Every length that had ever waited stayed in the count, and each report went through all of them."""
    pool = pool_of(TakingTurns("a", "b"))
    for num_tokens in range(1, 40):
        async with pool.lease(num_tokens=num_tokens, beat=no_beat, preferred=None, refused_by=()):
            assert pool.waiting_tokens == ()
    assert not pool._waiting_tokens
