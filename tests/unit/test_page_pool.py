"""Counting pages: none lost, none given twice, neighbours kept together."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from colm.errors import CapacityExceeded
from decode_node.page_pool import PageLease, PagePool

MAX_PAGES = 24


def longest_run(pages: set[int]) -> int:
    longest = length = 0
    for page in range(MAX_PAGES + 1):
        length = length + 1 if page in pages else 0
        longest = max(longest, length)
    return longest


class PagePoolMachine(RuleBasedStateMachine):
    """Against a model that is only a set of free pages."""

    leases = Bundle("leases")

    @initialize(num_pages=st.integers(1, MAX_PAGES))
    def create(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.free = set(range(num_pages))

    @rule(target=leases, num_pages=st.integers(1, MAX_PAGES + 1))
    def reserve(self, num_pages: int) -> object:
        if num_pages > len(self.free):
            with pytest.raises(CapacityExceeded):
                self.pool.reserve("request", num_pages)
            return multiple()
        had_room_in_one_run = longest_run(self.free) >= num_pages
        lease = self.pool.reserve("request", num_pages)
        assert len(lease.page_ids) == num_pages
        assert self.free.issuperset(lease.page_ids)
        if had_room_in_one_run:
            first = lease.page_ids[0]
            assert lease.page_ids == tuple(range(first, first + num_pages))
        self.free.difference_update(lease.page_ids)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: PageLease) -> None:
        self.pool.release(lease)
        self.free.update(lease.page_ids)
        with pytest.raises(KeyError):
            self.pool.release(lease)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.num_free == len(self.free)
            assert self.pool.num_used == self.pool.num_pages - len(self.free)


TestPagePool = PagePoolMachine.TestCase


def test_a_refused_reservation_takes_nothing() -> None:
    pool = PagePool(8)
    pool.reserve("first", 5)
    with pytest.raises(CapacityExceeded):
        pool.reserve("second", 4)
    assert pool.num_free == 3
    pool.check_integrity()


def test_a_reservation_beyond_what_is_free_says_so_and_that_waiting_helps() -> None:
    pool = PagePool(8)
    pool.reserve("first", 5)
    with pytest.raises(CapacityExceeded, match="needs 4 KV pages and 3 of 8 are free; try again later"):
        pool.reserve("second", 4)


def test_a_reservation_beyond_the_pool_says_that_waiting_is_useless() -> None:
    with pytest.raises(
        CapacityExceeded, match=r"needs 9 KV pages .* has 8 in all; shorten it or raise decode\.kv_cache"
    ):
        PagePool(8).reserve("first", 9)


def test_scattered_pages_serve_where_no_run_is_long_enough() -> None:
    pool = PagePool(6)
    leases = [pool.reserve(str(number), 1) for number in range(6)]
    for lease in leases[::2]:
        pool.release(lease)
    assert sorted(pool.reserve("wide", 3).page_ids) == sorted(lease.page_ids[0] for lease in leases[::2])


def test_freed_neighbours_grow_together_again() -> None:
    pool = PagePool(6)
    leases = [pool.reserve(str(number), 2) for number in range(3)]
    for lease in (leases[0], leases[2], leases[1]):
        pool.release(lease)
    assert pool.reserve("whole", 6).page_ids == (0, 1, 2, 3, 4, 5)


def test_a_lease_cannot_be_released_twice() -> None:
    pool = PagePool(4)
    lease = pool.reserve("request", 2)
    pool.release(lease)
    with pytest.raises(KeyError):
        pool.release(lease)
    assert pool.num_free == 4


def test_an_equal_lease_of_somebody_else_does_not_release_the_pages() -> None:
    pool = PagePool(4)
    lease = pool.reserve("request", 2)
    with pytest.raises(KeyError):
        pool.release(PageLease(lease.owner, lease.page_ids))
    assert pool.num_used == 2


@pytest.mark.parametrize("num_pages", [0, -1])
def test_a_pool_without_pages_is_refused(num_pages: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages={num_pages} must be at least 1"):
        PagePool(num_pages)
