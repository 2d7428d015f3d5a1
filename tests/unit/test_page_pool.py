"""Counting pages: none lost, none given twice, none freed while somebody holds it, neighbours kept together."""

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from decode_node.page_pool import PageLease, PagePool

MAX_PAGES = 24


def pages_of(lease: PageLease) -> list[int]:
    return [page for start, count in lease.runs for page in range(start, start + count)]


def longest_run(pages: set[int]) -> int:
    longest = length = 0
    for page in range(MAX_PAGES + 1):
        length = length + 1 if page in pages else 0
        longest = max(longest, length)
    return longest


def num_runs(pages: set[int]) -> int:
    return sum(page - 1 not in pages for page in pages)


class PagePoolMachine(RuleBasedStateMachine):
    """Compares the pool with a model that is only a set of free pages."""

    leases = Bundle("leases")

    @initialize(num_pages=st.integers(1, MAX_PAGES))
    def create(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.free = set(range(num_pages))
        self.num_extra_holders: Counter[PageLease] = Counter()

    @rule(target=leases, num_pages=st.integers(1, MAX_PAGES + 1))
    def reserve(self, num_pages: int) -> object:
        if num_pages > len(self.free):
            assert self.pool.reserve("request", num_pages) is None
            return multiple()
        had_room_in_one_run = longest_run(self.free) >= num_pages
        lease = self.pool.reserve("request", num_pages)
        assert lease is not None
        assert lease.num_pages == num_pages
        assert len(set(pages_of(lease))) == num_pages
        assert self.free.issuperset(pages_of(lease))
        assert len(lease.runs) <= num_runs(self.free)
        if had_room_in_one_run:
            assert len(lease.runs) == 1
        self.free.difference_update(pages_of(lease))
        return lease

    @rule(lease=leases)
    def hold_and_let_go(self, lease: PageLease) -> None:
        self.pool.retain(lease)
        assert not self.pool.release(lease)

    @rule(target=leases, lease=leases)
    def hold(self, lease: PageLease) -> object:
        self.num_extra_holders[lease] += 1
        self.pool.retain(lease)
        return multiple()

    @rule(lease=consumes(leases))
    def release(self, lease: PageLease) -> None:
        for _ in range(self.num_extra_holders.pop(lease, 0)):
            assert not self.pool.release(lease)
            self.pool.check_integrity()
            assert not self.free.intersection(pages_of(lease))
        assert self.pool.release(lease)
        self.free.update(pages_of(lease))
        with pytest.raises(KeyError):
            self.pool.release(lease)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.num_free == len(self.free)
            assert self.pool.num_used == self.pool.num_pages - len(self.free)


TestPagePool = PagePoolMachine.TestCase


def reserved(pool: PagePool, owner: str, num_pages: int) -> PageLease:
    lease = pool.reserve(owner, num_pages)
    assert lease is not None
    return lease


def test_a_refused_reservation_takes_nothing() -> None:
    pool = PagePool(8)
    pool.reserve("first", 5)
    assert pool.reserve("second", 4) is None
    assert pool.num_free == 3
    pool.check_integrity()


def test_pages_are_free_when_the_last_holder_has_let_go_whoever_that_is() -> None:
    pool = PagePool(8)
    lease = reserved(pool, "request", 8)
    pool.retain(lease)
    assert not pool.release(lease)
    assert pool.reserve("neighbour", 1) is None
    assert pool.release(lease)
    assert pool.reserve("neighbour", 8) is not None


def test_pages_that_nobody_holds_cannot_be_retained() -> None:
    pool = PagePool(8)
    lease = reserved(pool, "request", 8)
    pool.release(lease)
    with pytest.raises(KeyError):
        pool.retain(lease)


def test_scattered_pages_serve_where_no_run_is_long_enough() -> None:
    pool = PagePool(6)
    leases = [reserved(pool, str(number), 1) for number in range(6)]
    for lease in leases[::2]:
        pool.release(lease)
    assert sorted(reserved(pool, "wide", 3).runs) == sorted(run for lease in leases[::2] for run in lease.runs)


def test_freed_neighbours_grow_together_again() -> None:
    pool = PagePool(6)
    leases = [reserved(pool, str(number), 2) for number in range(3)]
    for lease in (leases[0], leases[2], leases[1]):
        pool.release(lease)
    assert reserved(pool, "whole", 6).runs == ((0, 6),)


def test_a_lease_of_a_million_pages_is_one_run() -> None:
    """Bug: a request of a million tokens held an id for each of its pages: 10 MB, and 50 ms of the event loop."""
    lease = reserved(PagePool(1_000_000), "long", 1_000_000)
    assert (lease.runs, lease.num_pages) == (((0, 1_000_000),), 1_000_000)


def test_a_lease_cannot_be_released_twice() -> None:
    pool = PagePool(4)
    lease = reserved(pool, "request", 2)
    pool.release(lease)
    with pytest.raises(KeyError):
        pool.release(lease)
    assert pool.num_free == 4


def test_an_equal_lease_of_somebody_else_does_not_release_the_pages() -> None:
    pool = PagePool(4)
    lease = reserved(pool, "request", 2)
    with pytest.raises(KeyError):
        pool.release(PageLease(lease.owner, lease.blocks))
    assert pool.num_used == 2


@pytest.mark.parametrize("num_pages", [0, -1])
def test_a_pool_without_pages_is_refused(num_pages: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages={num_pages} must be at least 1"):
        PagePool(num_pages)
