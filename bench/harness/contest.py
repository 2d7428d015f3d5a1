"""The parts of a benchmark: cases, each with contenders that are checked and then take turns."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, Self

from bench.harness.units import more_is_better, unit_of

Run = Callable[[], Mapping[str, float]]
"""A contender's turn: does the work once and says what it saw, each metric named by its unit, e.g. `{"s": 0.5}`."""

Measured = Literal["whole", "sampled", "modelled"]
"""How a figure came about: all of the work was run, a part of it that stands for the whole, or a formula."""


@dataclass(frozen=True, eq=False)
class Bar:
    """What is wanted of a ratio: the best of some contenders over the best of others."""

    name: str
    best_of: Sequence[str]
    over: Sequence[str]
    at_least: float


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A case that is ready to run.

    Raises:
        ValueError: a compared contender does not run, or a fact's unit is unknown.
    """

    check: Callable[[], None]
    """Compares the results of our contenders with the definition; raises AssertionError if one is wrong."""
    contenders: Mapping[str, Run]
    """By name, in the order of their turns."""
    ours: str | None = None
    """The contender whose ratios are reported; None for no ratios."""
    against: Sequence[str] = ()
    """The contenders that `ours` is compared with."""
    compared_by: str = "s"
    """The metric that ratios compare."""
    bars: Sequence[Bar] = ()
    """By the compared metric; the best contender is that of the best median."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Metrics that need no clock."""
    turns_of_round: int = 1
    """Of each contender: many short ones tell apart what a busy machine would hide between long ones."""

    def __post_init__(self) -> None:
        barred = {name for bar in self.bars for name in (*bar.best_of, *bar.over)}
        unknown = {*self.against, *barred, *filter(None, [self.ours])} - set(self.contenders)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are compared but do not run; contenders: {list(self.contenders)}")
        for metric in self.facts:
            unit_of(metric)

    def num_turns(self, num_rounds: int) -> int:
        """Of each contender, with the one that warms up."""
        return 1 + num_rounds * self.turns_of_round


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One shape that a benchmark measures; its fields are the shape in the record."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The case's name in the record and in the table."""

    @property
    def shape(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @property
    def measured(self) -> Measured:
        """How the figures come about."""
        return "whole"

    @abstractmethod
    def contest(self, seed: int) -> AbstractContextManager[Contest]:
        """Make the contenders and their inputs, for as long as the context lasts."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest value of one metric over all rounds."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of one value a round."""
        return cls(median=median(values), min=min(values), max=max(values), n=len(values))

    def as_json(self) -> dict[str, float]:
        """For JSON: times and rates with five significant digits, counts whole."""
        return {key: value if isinstance(value, int) else float(f"{value:.5g}") for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a contest."""

    seen: Mapping[str, Mapping[str, Spread]]
    """By contender and metric."""
    ours: str | None
    ratios: Mapping[str, Spread]
    """How many times better `ours` is than each contender it is compared with; both values are of the same round."""
    bars: Mapping[Bar, Spread]
    facts: Mapping[str, float]

    def metrics(self) -> dict[str, dict[str, float] | float]:
        """All metrics in one mapping, as in the record: `avx2_gflops_per_s`, `over_sdpa_x`, `density`.

        A bar brings its ratio and, beside it, the least that is wanted: `NAME_x` and `NAME_bar_x`.
        """
        seen = {f"{name}_{metric}": spread for name, each in self.seen.items() for metric, spread in each.items()}
        ratios = {f"over_{name}_x": spread for name, spread in self.ratios.items()}
        bars = {f"{bar.name}_x": spread for bar, spread in self.bars.items()}
        wanted = {f"{bar.name}_bar_x": bar.at_least for bar in self.bars}
        return {name: spread.as_json() for name, spread in (seen | ratios | bars).items()} | wanted | dict(self.facts)


def timed(
    call: Callable[[], object], *, num_calls: int = 1, clock: Callable[[], float] = time.perf_counter, **work: float
) -> Run:
    """A turn that measures the time of one piece of work.

    Args:
        call: does the work.
        num_calls: pieces of work in one call.
        clock: in seconds.
        work: amounts in one piece of work; `gb=2` adds `gb_per_s`.
    """

    def run() -> dict[str, float]:
        start = clock()
        call()
        seconds = (clock() - start) / num_calls
        return {"s": seconds} | {f"{what}_per_s": amount / seconds for what, amount in work.items()}

    return run


def measure(contest: Contest, num_rounds: int, after_turn: Callable[[], None] = lambda: None) -> Result:
    """Check the results, warm up in one round that does not count, then let the contenders take turns.

    Turns keep a ratio from comparing two moments of a busy machine.

    Raises:
        AssertionError: a contender's result is wrong; nothing has been timed.
        ValueError: a metric's unit is unknown, seen in the first turn.
    """
    contest.check()
    turns: dict[str, list[Mapping[str, float]]] = {name: [] for name in contest.contenders}
    for _ in range(contest.num_turns(num_rounds)):
        for name, run in contest.contenders.items():
            turns[name].append(seen := run())
            for metric in seen:
                unit_of(metric)
            after_turn()
    samples = {
        name: {metric: [turn[metric] for turn in each[1:]] for metric in each[0]} for name, each in turns.items()
    }
    ratios = {}
    if contest.ours is not None:
        mine = samples[contest.ours][contest.compared_by]
        for name in contest.against:
            pairs = zip(mine, samples[name][contest.compared_by], strict=True)
            more = more_is_better(contest.compared_by)
            ratios[name] = Spread.of([ours / theirs if more else theirs / ours for ours, theirs in pairs])
    by_metric = {name: each[contest.compared_by] for name, each in samples.items() if contest.compared_by in each}
    return Result(
        bars={bar: _against(bar, by_metric, contest.compared_by) for bar in contest.bars},
        seen={name: {metric: Spread.of(values) for metric, values in each.items()} for name, each in samples.items()},
        ours=contest.ours,
        ratios=ratios,
        facts=contest.facts,
    )


def _against(bar: Bar, by_name: Mapping[str, Sequence[float]], metric: str) -> Spread:
    """A bar's ratio, round by round."""
    more = more_is_better(metric)

    def best(names: Sequence[str]) -> Sequence[float]:
        return max((by_name[name] for name in names), key=lambda values: median(values) if more else -median(values))

    pairs = zip(best(bar.best_of), best(bar.over), strict=True)
    return Spread.of([ours / theirs if more else theirs / ours for ours, theirs in pairs])
