"""What makes way first: held against two lists, written down plainly."""

from hypothesis import given
from hypothesis import strategies as st

from colm.segmented_lru import PROTECTED_SHARE, SegmentedLru

SIZES = {name: size for size, name in enumerate("abcde", start=1)}
BUDGET = 10


def test_what_comes_once_pushes_out_nothing_that_was_wanted_again() -> None:
    lru: SegmentedLru[str] = SegmentedLru(BUDGET)
    for name in "abc":
        lru.add(name, SIZES[name])
    lru.use("a")
    assert list(lru) == ["b", "c", "a"]
    assert list(lru.on_probation) == ["b", "c"]
    lru.refresh("b")
    lru.use("c")
    assert list(lru) == ["b", "a", "c"]


@given(st.lists(st.tuples(st.sampled_from(["add", "use", "refresh", "remove"]), st.sampled_from(sorted(SIZES)))))
def test_it_is_two_lists(steps: list[tuple[str, str]]) -> None:
    lru: SegmentedLru[str] = SegmentedLru(BUDGET)
    probation, protected = list[str](), list[str]()
    for step, name in steps:
        if (step == "add") == (name in probation + protected):
            continue
        if step == "add":
            probation.append(name)
            lru.add(name, SIZES[name])
            continue
        mine = probation if name in probation else protected
        mine.remove(name)
        if step == "use":
            protected.append(name)
            while sum(SIZES[each] for each in protected) > PROTECTED_SHARE * BUDGET:
                probation.append(protected.pop(0))
        elif step == "refresh":
            mine.append(name)
        getattr(lru, step)(name)
        assert (list(lru), list(lru.on_probation)) == (probation + protected, probation)
        lru.check_integrity()
