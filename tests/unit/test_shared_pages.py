"""Pages of prompts that begin alike: shared, kept, given up; never taken in use, nor found without their tokens."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from decode_node.page_pool import PageLease, PagePool
from decode_node.prefix_cache import PagesWanted, PrefixCache, Reservation

BLOCK_PAGES = 2
Prompt = tuple[int, ...]
"""One number for half a page; the last half of an odd prompt ends inside its page."""


def wanted_for(prompt: Prompt, num_own_pages: int) -> PagesWanted:
    """Blocks of two pages; what an odd prompt's last page does not hold is its request's."""
    step = 2 * BLOCK_PAGES
    ends = [min(start + step, len(prompt)) for start in range(0, len(prompt), step)]
    return PagesWanted(
        num_pages=-(-len(prompt) // 2) + num_own_pages,
        keys=tuple(bytes(prompt[:end]) for end in ends),
        sizes=tuple((end - start) // 2 for start, end in zip([0, *ends], ends, strict=False)),
        has_stub=len(prompt) % 2 > 0,
    )


def pages_of(lease: PageLease) -> list[int]:
    return [page for start, count in lease.runs for page in range(start, start + count)]


class PrefixCacheMachine(RuleBasedStateMachine):
    """Compares the cache with what lies in each page: halves of pages, written when their request says `arrived`."""

    leases = Bundle("leases")

    @initialize(num_pages=st.integers(1, 24), max_idle_pages=st.integers(0, 24))
    def create(self, num_pages: int, max_idle_pages: int) -> None:
        self.cache = PrefixCache(PagePool(num_pages), max_idle_pages=max_idle_pages)
        self.halves: dict[int, list[Prompt | None]] = {page: [None, None] for page in range(num_pages)}
        self.prompts: dict[PageLease, Prompt] = {}
        self.waiting: dict[PageLease, Reservation] = {}

    @rule(
        target=leases,
        prompt=st.lists(st.integers(0, 1), max_size=11).map(tuple),
        num_own_pages=st.integers(1, 3),
    )
    def reserve(self, prompt: Prompt, num_own_pages: int) -> object:
        cache, wanted = self.cache, wanted_for(prompt, num_own_pages)
        num_free = cache.pool.num_pages - len({page for lease in self.prompts for page in pages_of(lease)})
        reservation = cache.reserve("request", wanted)
        if reservation is None:
            assert wanted.num_pages > num_free, "refused for pages that nobody uses"
            return multiple()
        lease = reservation.lease
        pages = pages_of(lease)
        assert len(pages) == len({*pages}) == wanted.num_pages
        num_shared = sum(wanted.sizes[: reservation.num_found])
        in_use = {page for each in self.prompts for page in pages_of(each)}
        assert not in_use.intersection(pages[num_shared:]), "own pages that somebody else uses"
        if reservation.copy is not None:
            assert reservation.num_found == len(wanted.keys)
            assert reservation.copy[1] == pages[num_shared], "the copy of the stub follows the shared pages"
        self.prompts[lease] = prompt
        if reservation.sources:
            assert all(source in self.waiting for source in reservation.sources)
        self.waiting[lease] = reservation
        if not reservation.sources:
            self.check_found(lease)
        return lease

    def check_found(self, lease: PageLease) -> None:
        """What was found is here: in its pages lie its tokens, and all before them."""
        reservation, prompt, pages = self.waiting[lease], self.prompts[lease], pages_of(lease)
        if reservation.copy is not None:
            source, own = reservation.copy
            self.halves[own] = [self.halves[source][0], None]
        num_halves = min(reservation.num_found * 2 * BLOCK_PAGES, len(prompt))
        for half in range(num_halves):
            assert self.halves[pages[half // 2]][half % 2] == prompt[: half + 1]

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        ready = [lease for lease, each in self.waiting.items() if not any(s in self.waiting for s in each.sources)]
        if not ready:
            return
        lease = data.draw(st.sampled_from(ready))
        self.check_found(lease)
        reservation, prompt, pages = self.waiting.pop(lease), self.prompts[lease], pages_of(lease)
        for half in range(min(reservation.num_found * 2 * BLOCK_PAGES, len(prompt)), 2 * len(pages)):
            # Behind its prompt lies its answer, which nobody else may read.
            self.halves[pages[half // 2]][half % 2] = prompt[: half + 1] if half < len(prompt) else None
        self.cache.arrived(lease)

    @rule(lease=consumes(leases))
    def end(self, lease: PageLease) -> None:
        """Its request ends; if it brings something, that fails, and so does what waits for it."""
        if lease in self.prompts:
            if lease in self.waiting:
                self.fail(lease)
            self.let_go(lease)

    def fail(self, lease: PageLease) -> None:
        self.cache.abandon(lease)
        del self.waiting[lease]
        for other in [other for other, each in self.waiting.items() if lease in each.sources]:
            if other in self.waiting:
                self.fail(other)
                self.let_go(other)

    def let_go(self, lease: PageLease) -> None:
        assert self.cache.release(lease)
        del self.prompts[lease]

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            used = {page for lease in self.prompts for page in pages_of(lease)}
            assert self.cache.pool.num_used >= len(used)


TestPrefixCache = PrefixCacheMachine.TestCase


def cache_of(num_pages: int, max_idle_pages: int | None = None) -> PrefixCache:
    return PrefixCache(PagePool(num_pages), max_idle_pages=num_pages if max_idle_pages is None else max_idle_pages)


def served(cache: PrefixCache, prompt: Prompt) -> Reservation:
    """A request's reservation, after it has ended well."""
    reservation = cache.reserve("request", wanted_for(prompt, 1))
    assert reservation is not None
    cache.arrived(reservation.lease)
    cache.release(reservation.lease)
    cache.check_integrity()
    return reservation


DOCUMENT = (1, 2, 3, 4, 5, 6, 7, 8)


def test_a_prompt_that_begins_alike_finds_whole_blocks() -> None:
    cache = cache_of(16)
    first = served(cache, (*DOCUMENT, 9))
    second = served(cache, (*DOCUMENT, 10, 11))
    assert (first.num_found, second.num_found) == (0, 2)
    assert pages_of(second.lease)[:4] == pages_of(first.lease)[:4]
    assert second.copy is None


def test_the_same_prompt_finds_all_and_copies_the_page_in_which_it_ends() -> None:
    cache = cache_of(16)
    first, second = served(cache, (*DOCUMENT, 9)), served(cache, (*DOCUMENT, 9))
    assert second.num_found == 3
    assert second.copy == (pages_of(first.lease)[4], pages_of(second.lease)[4])


def test_blocks_behind_a_missing_one_are_not_found() -> None:
    """Bug elsewhere: pages past a hole were counted as found."""
    cache = cache_of(16)
    keys = wanted_for(DOCUMENT, 1).keys
    served(cache, DOCUMENT)
    cache._forget(cache._entries[keys[0]])
    assert served(cache, DOCUMENT).num_found == 0
    assert served(cache, DOCUMENT).num_found == 2


def test_who_comes_while_a_prompt_is_on_its_way_shares_its_pages_and_waits() -> None:
    cache = cache_of(16)
    first, second = (cache.reserve(name, wanted_for((*DOCUMENT, 9), 1)) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert (second.num_found, second.sources) == (3, (first.lease,))
    assert second.lease.num_pages + first.lease.num_pages - 4 == cache.pool.num_used
    cache.abandon(first.lease)
    third = cache.reserve("third", wanted_for((*DOCUMENT, 9), 1))
    assert third is not None
    assert third.num_found == 0, "nobody finds what does not come"
    cache.check_integrity()


def test_pages_in_use_are_kept_when_others_are_wanted() -> None:
    cache = cache_of(12)
    idle = served(cache, (9, 9, 9, 9))
    user = cache.reserve("user", wanted_for(DOCUMENT, 1))
    assert user is not None
    cache.arrived(user.lease)
    big = cache.reserve("big", PagesWanted(num_pages=7))
    assert big is not None, "idle pages give way"
    assert {*pages_of(idle.lease)} & {*pages_of(big.lease)}
    assert not {*pages_of(user.lease)} & {*pages_of(big.lease)}
    assert cache.reserve("more", PagesWanted(num_pages=1)) is None
    cache.release(big.lease)
    assert served(cache, DOCUMENT).num_found == 2


def test_what_was_found_is_not_counted_as_room() -> None:
    """Bug elsewhere: found pages stop being free to take, but capacity had been checked before."""
    cache = cache_of(5)
    served(cache, DOCUMENT)
    assert cache.reserve("request", wanted_for(DOCUMENT, 2)) is None
    assert cache.pool.num_idle == 4


def test_a_stub_is_given_up_where_there_is_no_page_for_its_copy() -> None:
    cache = cache_of(6)
    served(cache, (*DOCUMENT, 9))
    tight = cache.reserve("tight", wanted_for((*DOCUMENT, 9), 1))
    assert tight is not None, "it has room without the cache"
    assert (tight.num_found, tight.copy) == (2, None)


def test_one_off_documents_leave_what_was_wanted_again() -> None:
    cache = cache_of(20, max_idle_pages=12)
    for _ in range(2):
        served(cache, DOCUMENT)
    for number in range(20, 30):
        served(cache, (number,) * 8)
    assert served(cache, DOCUMENT).num_found == 2


def test_a_prompts_end_goes_before_its_beginning() -> None:
    cache = cache_of(20, max_idle_pages=4)
    served(cache, (*DOCUMENT, *DOCUMENT))
    assert served(cache, DOCUMENT).num_found == 2


def test_no_more_is_kept_than_the_limit() -> None:
    cache = cache_of(20, max_idle_pages=3)
    served(cache, DOCUMENT)
    assert cache.pool.num_idle == 2, "whole blocks"
    assert cache.num_evicted_pages == 2


@pytest.mark.parametrize("num_pages", [1, 7])
def test_a_request_without_keys_is_only_a_lease(num_pages: int) -> None:
    cache = cache_of(8)
    reservation = cache.reserve("request", PagesWanted(num_pages=num_pages))
    assert reservation is not None
    assert (reservation.num_found, reservation.lease.num_pages) == (0, num_pages)
    assert cache.release(reservation.lease)
    assert cache.num_available == cache.pool.num_free == 8
