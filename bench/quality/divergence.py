"""How one reading of a text differs from another: perplexity, and divergence token by token.

Shapes: T tokens of a text, Q tokens that are read at once, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, quantiles

import numpy as np
import torch
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from numpy.typing import NDArray
from torch import Tensor

from bench.quality.experiment import NUM_BLOCKS, NUM_SCORED
from bench.quality.metrics import block_means, negative_log_likelihoods

KL_COLUMNS = ("KL, mean", "KL, 99th percentile", "KL, largest", "same likeliest token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Over the last `NUM_SCORED` tokens of a text."""

    baseline_nll_blocks: list[float]
    """Mean -ln p over blocks of the scored tokens, in order."""
    nll_blocks: list[float]
    """Likewise, of the other reading."""
    kl_mean: float
    """Of the next token's distribution in the other reading from that in the baseline, at each token; nats."""
    kl_p99: float
    kl_max: float
    same_top_share: float
    """Of the scored tokens, those where both find the same next token likeliest."""


def divergences(baseline_QV: Tensor, other_QV: Tensor) -> Tensor:
    """KL(baseline || other) of each row of logits in nats, float64 [Q]."""
    baseline_QV, other_QV = (each.double().log_softmax(dim=1) for each in (baseline_QV, other_QV))
    return (baseline_QV.exp() * (baseline_QV - other_QV)).sum(dim=1)


def compare(text_T: NDArray[np.int64], baseline: Iterable[Tensor], other: Iterable[Tensor]) -> Divergence:
    """Compare two readings of a text's tokens but the last.

    Args:
        text_T: all of its tokens.
        baseline: logits_QV of `Reading.logits`, over all tokens but the last.
        other: likewise.
    """
    following = torch.from_numpy(text_T[1:]).split(MAX_QUERY_TOKENS)
    nlls: tuple[list[float], list[float]] = ([], [])
    kls: list[float] = []
    is_same: list[bool] = []
    for baseline_QV, other_QV, next_Q in zip(baseline, other, following, strict=True):
        for of_reading, logits_QV in zip(nlls, (baseline_QV, other_QV), strict=True):
            of_reading += negative_log_likelihoods(logits_QV, next_Q).tolist()
        kls += divergences(baseline_QV, other_QV).tolist()
        is_same += (baseline_QV.argmax(dim=1) == other_QV.argmax(dim=1)).tolist()
    scored = kls[-NUM_SCORED:]
    blocks = [[round(each, 6) for each in block_means(nll[-NUM_SCORED:], NUM_BLOCKS)] for nll in nlls]
    return Divergence(
        baseline_nll_blocks=blocks[0],
        nll_blocks=blocks[1],
        kl_mean=mean(scored),
        kl_p99=quantiles(scored, n=100)[-1],
        kl_max=max(scored),
        same_top_share=mean(is_same[-NUM_SCORED:]),
    )


def kl_words(found: Divergence) -> list[str]:
    """As in `KL_COLUMNS`."""
    return [*(f"{each:.5f}" for each in (found.kl_mean, found.kl_p99, found.kl_max)), f"{found.same_top_share:.1%}"]
