"""Figures of quality, and how far chance may have moved them.

Shapes: T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from torch import Tensor


def negative_log_likelihoods(logits_TV: Tensor, token_ids_T: Tensor) -> Tensor:
    """-ln p of each token under the logits that predict it, float64 [T]."""
    logits_TV = logits_TV.double()
    chosen_T = logits_TV.gather(1, token_ids_T.unsqueeze(1)).squeeze(1)
    return logits_TV.logsumexp(dim=1) - chosen_T


def block_means(values_T: Sequence[float], num_blocks: int) -> list[float]:
    """Means of consecutive blocks of equal length.

    Raises:
        ValueError: the values do not divide into so many blocks.
    """
    if len(values_T) % num_blocks:
        raise ValueError(f"{len(values_T)} values do not divide into {num_blocks} equal blocks")
    size = len(values_T) // num_blocks
    return [mean(values_T[start : start + size]) for start in range(0, len(values_T), size)]


def perplexity(nll_blocks: Sequence[float]) -> float:
    """Of blocks of equal length: exp(mean negative log-likelihood)."""
    return math.exp(mean(nll_blocks))


class Ratio(NamedTuple):
    """A ratio and its standard error."""

    value: float
    error: float


def perplexity_ratio(nll_blocks: Sequence[float], baseline_blocks: Sequence[float]) -> Ratio:
    """Perplexity over a baseline's on the same tokens, block by block.

    The error is that of the mean difference, to first order; blocks, not tokens, are taken to be independent.
    """
    differences = [ours - theirs for ours, theirs in zip(nll_blocks, baseline_blocks, strict=True)]
    value = math.exp(mean(differences))
    return Ratio(value, value * stdev(differences) / math.sqrt(len(differences)))


def clopper_pearson(num_found: int, num_asked: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share of which `num_found` of `num_asked` independent draws were successes.

    Clopper and Pearson 1934: each end is the share at which a result as far out has half the remaining probability.

    Raises:
        ValueError: not 0 <= num_found <= num_asked, or nothing asked.
    """
    if not 0 <= num_found <= num_asked or num_asked < 1:
        raise ValueError(f"num_found={num_found} must be between 0 and num_asked={num_asked}, which is at least 1")
    tail = (1.0 - confidence) / 2.0

    def at_most(count: int, share: float) -> float:
        """P(X <= count), X binomial."""
        terms = (math.comb(num_asked, i) * share**i * (1.0 - share) ** (num_asked - i) for i in range(count + 1))
        return math.fsum(terms)

    low = 0.0 if num_found == 0 else _root(lambda share: at_most(num_found - 1, share) - (1.0 - tail))
    high = 1.0 if num_found == num_asked else _root(lambda share: at_most(num_found, share) - tail)
    return low, high


def _root(falling: Callable[[float], float]) -> float:
    """Where a falling function of a share crosses 0, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if falling(middle) > 0.0 else (low, middle)
    return (low + high) / 2.0
