"""What all tiles of a layer cost, from a stratified sample of them.

A tile's cost is known but for two rates: so much a row, and so much a pair of query and key. Both are fitted to the
sample. What the fit misses is averaged in each stratum and counted for all of its tiles, so that a cost of another
shape, as where keys outgrow a cache, is not missed. (The generalised regression estimator of survey sampling.)
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NUM_STRATA = 8
PER_STRATUM = 2
"""The least that says how much the tiles of a stratum differ."""
MANY_TILES = 256
"""Each doubling above halves the strata, down to `LEAST_STRATA`: long tiles stray less, and take longer."""
LEAST_STRATA = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A sum over all tiles."""

    total: float
    standard_error: float
    """Zero where costs are known but for their rates, or every tile of every layer was timed."""
    num_timed: int
    num_tiles: int


def strata(num_tiles: int) -> list[range]:
    """Runs of neighbouring tiles of about equal number, each of `PER_STRATUM` or more where there are so many."""
    many = max(LEAST_STRATA, NUM_STRATA * MANY_TILES // max(MANY_TILES, num_tiles))
    num_strata = max(1, min(many, num_tiles // PER_STRATUM))
    ends = [index * num_tiles // num_strata for index in range(num_strata + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def choose(groups: Sequence[range], *, seed: int) -> list[int]:
    """`PER_STRATUM` tiles of each stratum, at random and in random order; all where that is about as many."""
    generator = random.Random(seed)
    is_few = sum(map(len, groups)) <= NUM_STRATA * PER_STRATUM
    chosen = [
        tile
        for group in groups
        for tile in generator.sample(group, len(group) if is_few else min(PER_STRATUM, len(group)))
    ]
    generator.shuffle(chosen)
    return chosen


def estimate(
    groups: Sequence[range],
    costs: Mapping[int, float],
    known: Callable[[int], tuple[float, float]],
    *,
    num_layers: int = 1,
) -> Estimate:
    """The sum of all tiles' costs, with its standard error.

    Args:
        groups: of `strata`.
        costs: of the tiles that were timed, some of each stratum.
        known: a tile's rows, and its pairs of query and key.
        num_layers: that have such tiles, of which one was timed.
    """
    timed = sorted(costs)
    sample = np.array([known(tile) for tile in timed], dtype=np.float64)
    scale = sample.max(axis=0)  # rows and pairs are many orders of magnitude apart
    rates, _, rank, _ = np.linalg.lstsq(sample / scale, np.array([costs[tile] for tile in timed]), rcond=None)
    fitted = (np.array([known(tile) for group in groups for tile in group]) / scale) @ rates
    total, variance = float(fitted.sum()), 0.0
    for group in groups:
        missed = [costs[tile] - fitted[tile] for tile in group if tile in costs]
        total += len(group) * math.fsum(missed) / len(missed)
        open_share = 1 - len(missed) / (len(group) * num_layers)
        spread = float(np.var(missed, ddof=1)) if len(missed) > 1 else 0.0
        variance += len(group) ** 2 * open_share * spread / len(missed)
    # The fit follows the sample, by as many numbers as it has.
    variance *= len(timed) / max(1, len(timed) - int(rank))
    total = max(total, math.fsum(costs.values()))  # the rest took some time too, however the sample scatters
    return Estimate(
        total=total, standard_error=math.sqrt(variance), num_timed=len(timed), num_tiles=sum(map(len, groups))
    )
