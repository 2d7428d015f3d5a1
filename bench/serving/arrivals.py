"""Times between arrivals: the load generator's and the simulator's.

Shapes: N gaps.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_BURSTINESS: Final = 0.05
"""Below it, nearly all gaps are nothing, and their sum may be."""


def gaps(count: int, burstiness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """So many independent times between arrivals, in units of their mean.

    They have a gamma distribution, whose shape is the burstiness: mean 1, variance 1 / burstiness. At 1 it is the
    exponential one, and arrivals are a Poisson process. Below 1 they come in clusters, above 1 more evenly. vLLM's
    `--burstiness` is the same number.

    Args:
        count: of the gaps.
        burstiness: finite, at least `MIN_BURSTINESS`.
        rng: draws them.

    Returns:
        gaps_N, none negative.
    """
    return rng.gamma(burstiness, 1 / burstiness, count)


def in_words(pattern: str, burstiness: float) -> str:
    """A pattern by its name where its moments are a Poisson process, else with how they are distributed."""
    if burstiness == 1:
        return pattern
    gamma = f"gamma {burstiness:g}"
    return gamma if pattern == "poisson" else f"{pattern}, {gamma}"
