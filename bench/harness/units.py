"""Units: each metric's name ends in one of them, and each is shown in one way."""

import math
import re
from collections.abc import Callable, Mapping

from cluster.cli.output import human_bytes

_LENGTHS = ("num_tokens", "num_queries", "num_keys", "context_len")
_LAST_WORDS = re.compile(r"(?:^|_)([a-z]+_per_s|[a-z]+)$")


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 1.23, 12.3, 1,235."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def duration(seconds: float) -> str:
    """E.g. 12.3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-9)} ns"


def length(count: int) -> str:
    """A token count: powers of two as 2K to 1M, any other count with all digits."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def parse_length(text: str) -> int:
    """The count that `length` prints so: 2K is 2048; plain digits are a count too.

    Raises:
        ValueError: it is neither, or below 1.
    """
    found = re.fullmatch(r"([1-9][0-9]*)([KM]?)", text)
    if found is None:
        raise ValueError(f"length {text!r} is not one; write e.g. 2K, 1M or 1000")
    return int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]]


UNITS: Mapping[str, Callable[[float], str]] = {
    "s": duration,
    "bytes": human_bytes,
    "gflops_per_s": lambda rate: f"{digits(rate)} GFLOP/s",
    "gb_per_s": lambda rate: f"{digits(rate)} GB/s",
    "tokens_per_s": lambda rate: f"{digits(rate)} tokens/s",
    "x": lambda ratio: f"{digits(ratio)}x",
    "fraction": digits,
    "density": digits,
}
"""The unit of a metric, by the last words of its name. `gflops` and `gb` count 10^9; fraction and density are shares of
one."""


def unit_of(metric: str) -> str:
    """The unit that a metric's name ends in.

    Raises:
        ValueError: it ends in none that is known, e.g. `gflop_per_s`.
    """
    found = _LAST_WORDS.search(metric)
    if found is None or found[1] not in UNITS:
        raise ValueError(f"the metric {metric!r} ends in no known unit; use one of {', '.join(UNITS)}")
    return found[1]


def more_is_better(metric: str) -> bool:
    """Whether a larger value is better: true for rates, false for times and bytes."""
    return unit_of(metric).endswith("_per_s")


def show(metric: str, value: float) -> str:
    """A metric's value as people read it."""
    return UNITS[unit_of(metric)](value)


def show_shape(name: str, value: object) -> str:
    """One field of a shape: lengths as 8K, bytes as 4.0 MiB, nested shapes field by field."""
    if isinstance(value, Mapping):
        return ", ".join(show_shape(key, each) for key, each in value.items())
    if isinstance(value, int) and name in _LENGTHS:
        return f"{name} {length(value)}"
    return f"{name} {human_bytes(value)}" if isinstance(value, int) and name.endswith("_bytes") else f"{name} {value}"
