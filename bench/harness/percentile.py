"""Percentiles of values that were seen, never of values in between."""

from collections.abc import Sequence


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that `percent` in 100 of them do not exceed.

    Raises:
        ValueError: there are no values, or percent is not between 1 and 100.
    """
    if not values or not 1 <= percent <= 100:
        raise ValueError(f"percent={percent} of {len(values)} values; it must be 1 to 100, of at least one value")
    return sorted(values)[-(-percent * len(values) // 100) - 1]
