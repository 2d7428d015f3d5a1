"""Cases of axes that do not depend on one another: fewer than all combinations, and none of any two values missing."""

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from itertools import combinations, product
from typing import Any

Case = tuple[Any, ...]


def pairs(axes: Mapping[str, Iterable[Any]]) -> tuple[str, list[Case]]:
    """Arguments of `pytest.mark.parametrize`: every value of an axis stands beside every value of every other.

    What only three or more values together bring about is not looked for. Values that do, as a variant and the dtype
    that it is compiled for, belong into one axis: a tuple of them, under their names with commas between.

    Args:
        axes: values by name, or tuples of values by names with commas between.

    Returns:
        The names, and a tuple of values for each case; always the same for the same axes.
    """
    several = {name: tuple(values) for name, values in axes.items()}
    sizes = [range(len(values)) for values in several.values()]
    missing = {
        ((one, i), (other, j))
        for (one, values), (other, others) in combinations(enumerate(sizes), 2)
        for i, j in product(values, others)
    }
    rows: list[tuple[int, ...]] = []
    while missing:
        row = dict(min(missing))
        for axis, values in enumerate(sizes):
            if axis not in row:
                row[axis] = max(values, key=partial(_gain, missing, rows, row, axis))
        rows.append(tuple(row[axis] for axis in range(len(sizes))))
        missing -= set(combinations(enumerate(rows[-1]), 2))
    cases = [
        tuple(
            part
            for name, values, number in zip(several, several.values(), row, strict=True)
            for part in (values[number] if "," in name else (values[number],))
        )
        for row in rows or product(*sizes)
    ]
    return ",".join(several), cases


def _gain(
    missing: Collection[Any], rows: Iterable[Case], row: Mapping[int, int], axis: int, value: int
) -> tuple[int, int]:
    """How many missing pairs a value would make with those that a case has; of equals, the value used least is best."""
    num_new = sum(tuple(sorted([other, (axis, value)])) in missing for other in row.items())
    return num_new, -sum(earlier[axis] == value for earlier in rows)
