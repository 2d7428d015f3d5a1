"""Cases that cover all pairs."""

from itertools import combinations, product

import pytest

from tests.covering import pairs

AXES = [
    {"a": range(8), "b": range(6), "c": range(3)},
    {"a": "xyz", "b": "pq", "c": [None], "d": range(5)},
    {"a": range(4)},
]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_any_two_values_of_two_axes_share_a_case_and_cases_are_few(axes: dict[str, list[object]]) -> None:
    names, cases = pairs(axes)
    assert names.split(",") == list(axes)
    for (i, values), (j, others) in combinations(enumerate(axes.values()), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(values, others))
    longest = sorted(map(len, axes.values()))[-2:]
    assert len(set(cases)) == len(cases) <= 1.25 * longest[0] * longest[-1]


def test_values_of_one_axis_that_belong_together_stay_together() -> None:
    names, cases = pairs({"a,b": [(1, 2), (3, 4)], "c": [5, 6]})
    assert names == "a,b,c"
    assert sorted(cases) == [(1, 2, 5), (1, 2, 6), (3, 4, 5), (3, 4, 6)]
