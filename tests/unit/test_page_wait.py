"""How long a request waits for pages, as it is told."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_node.page_pool import PageLease, PagePool
from decode_node.page_wait import PrefillPace, page_wait_s

NUM_PAGES = 12


def as_it_happens(pool: PagePool, held: list[tuple[PageLease, int]], in_line: list[tuple[int, int]]) -> int:
    """When the last in line gets its pages, second by second."""
    running, waiting = list(held), list(in_line)
    for now_s in range(1000):
        for lease, end_s in [each for each in running if each[1] == now_s]:
            pool.release(lease)
            running.remove((lease, end_s))
        while waiting and (lease_of_next := pool.reserve("next", waiting[0][0])) is not None:
            running.append((lease_of_next, now_s + waiting.pop(0)[1]))
        if not waiting:
            return now_s
    raise AssertionError("somebody waits for ever")


@given(
    own=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.booleans()), max_size=5),
    in_line=st.lists(st.tuples(st.integers(1, NUM_PAGES), st.integers(1, 9)), min_size=1, max_size=5),
)
def test_a_wait_is_what_comes_if_everybody_takes_as_long_as_is_thought(
    own: list[tuple[int, int, bool]], in_line: list[tuple[int, int]]
) -> None:
    """Leases that share a block too: it is free with the last of them."""
    pool, held = PagePool(NUM_PAGES), list[tuple[PageLease, int]]()
    for num_pages, end_s, shares in own:
        shared = held[-1][0].blocks[:1] if shares and held else ()
        if (lease := pool.reserve("holder", num_pages, shared=shared)) is not None:
            held.append((lease, end_s))
    wait_s = page_wait_s(pool.num_free, held, in_line)
    assert wait_s == as_it_happens(pool, held, in_line)


def test_nobody_is_told_a_time_that_hangs_on_somebody_of_whom_nobody_knows() -> None:
    pool = PagePool(4)
    known, unknown = pool.reserve("known", 2), pool.reserve("unknown", 1)
    assert known is not None
    assert unknown is not None
    held = [(known, 3.0), (unknown, inf)]
    assert page_wait_s(1, held, [(3, 5.0)]) == 3.0
    assert page_wait_s(1, held, [(4, 5.0)]) is None
    assert page_wait_s(1, held, [(3, inf), (1, 1.0)]) is None
    assert page_wait_s(1, [], [(4, 5.0)]) is None  # a thread still writes into the others


def test_a_prefill_is_thought_to_go_as_the_last_ones_did() -> None:
    pace = PrefillPace()
    assert (pace.seconds(0), pace.seconds(1)) == (0.0, inf)
    pace.note(0, 1.0)  # all of it was found
    assert pace.seconds(1) == inf
    pace.note(100, 1.0)
    pace.note(300, 1.0)
    assert pace.seconds(1000) == pytest.approx(5.0)
    for _ in range(8):
        pace.note(10, 1.0)
    assert pace.seconds(10) == pytest.approx(1.0)
