"""Which pattern serves each head best, under a budget of the kernel's products.

Shapes: N tokens of a text, H query heads, K kv heads, E head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from colm_kernels.sparse_estimate import vertical_slash_mass
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from colm_kernels.steps import all_at_once
from numpy.typing import NDArray
from torch import Tensor

from colm.errors import ConfigError
from colm.model import ChainTransformer
from prefill_node.sparse.layers import LayerAttention, layer_attentions
from prefill_node.sparse.patterns import AShape, BlockSparse, HeadPattern, PatternFile, VerticalSlash
from prefill_node.sparse.plan import ListPlan
from prefill_node.sparse.planner import ESTIMATION_ROWS, layer_plan, list_of
from prefill_node.sparse.policy import SparsePolicy

Objective = Literal["mass", "output"]

CANDIDATES: tuple[HeadPattern, ...] = (
    AShape(sink_tokens=1, local_tokens=4),
    VerticalSlash(num_verticals=1, num_slashes=64),
    VerticalSlash(num_verticals=1, num_slashes=16),
    VerticalSlash(num_verticals=1, num_slashes=4),
    VerticalSlash(num_verticals=1, num_slashes=1),
    VerticalSlash(num_verticals=16, num_slashes=1),
    BlockSparse(num_blocks=1),
)
"""Proportions of what is tried: each is made as large as the budget lets it be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """What a search looks for."""

    objective: Objective = "mass"
    """`mass` wants the most attention recalled, `output` the smallest error of the attention's output."""
    budget: float = 0.25
    """Products of the sparse kernel as a share of the dense one's, for every head."""
    policy: SparsePolicy = field(default_factory=SparsePolicy)
    """What every row is given beside its pattern."""

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective={self.objective!r} is unknown; use {' or '.join(get_args(Objective))}")
        if not 0.0 < self.budget < 1.0:
            raise ValueError(f"budget={self.budget} must be above 0 and below 1, which is dense attention")


def search_patterns(
    model: ChainTransformer,
    token_ids: NDArray[np.int64],
    options: SearchOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PatternFile:
    """The best pattern of every head of chain 1 over a text.

    Args:
        model: chain 1, or a model of which chain 1 is run.
        token_ids: the text; the longer, the more there is to leave out.
        options: objective and budget.
        progress: told after each layer.

    Returns:
        The patterns; each one's score is the recalled share, averaged over the text's tokens, whatever the objective.

    Raises:
        ConfigError: the budget has no room beside what every row is given.
    """
    layers = []
    for attention in layer_attentions(model, token_ids):
        layers.append(search_layer(attention, options))
        if progress is not None:
            progress(len(layers), model.config.num_layers)
    return PatternFile(tuple(layers))


@dataclass(frozen=True, slots=True)
class _Tried:
    """What the candidates of one proportion do, head by head."""

    patterns: Sequence[HeadPattern]
    fits_H: Tensor
    recall_H: Tensor
    error_H: Tensor


def search_layer(attention: LayerAttention, options: SearchOptions) -> tuple[HeadPattern, ...]:
    """The best pattern of each head of one layer; see `search_patterns`."""
    num_tokens, num_heads, _ = attention.q_NHE.shape
    q_NHE, k_KNE = attention.q_NHE, attention.k_KNE
    masses = all_at_once(vertical_slash_mass(q_NHE, k_KNE, num_lists=num_heads, num_rows=ESTIMATION_ROWS))
    tried = [_try(candidate, attention, masses, options) for candidate in CANDIDATES]
    fits_CH = torch.stack([of_candidate.fits_H for of_candidate in tried])
    if not fits_CH.any(dim=0).all():
        raise ConfigError(
            f"budget={options.budget} has no room for any pattern beside what every row of {num_tokens} tokens is "
            "given; raise it, or use a longer text"
        )
    if options.objective == "mass":
        worth_CH = torch.stack([of_candidate.recall_H for of_candidate in tried])
    else:
        worth_CH = -torch.stack([of_candidate.error_H for of_candidate in tried])
    best_H = worth_CH.masked_fill(~fits_CH, float("-inf")).argmax(dim=0)
    return tuple(
        replace(tried[best].patterns[head], score=round(float(tried[best].recall_H[head]), 4))
        for head, best in enumerate(best_H.tolist())
    )


def _try(
    candidate: HeadPattern, attention: LayerAttention, masses: tuple[Tensor, Tensor], options: SearchOptions
) -> _Tried:
    """The candidate in its largest size for each head, all heads in one call of the kernel."""
    q_NHE, k_KNE = attention.q_NHE, attention.k_KNE
    num_heads = q_NHE.shape[1]
    patterns, lists, fits = [], [], []
    for head in range(num_heads):
        of_head = slice(head, head + 1)
        kv_head = head * len(k_KNE) // num_heads
        one = (q_NHE[:, of_head], k_KNE[kv_head : kv_head + 1], masses[0][of_head], masses[1][of_head])
        pattern, of_list, does_fit = _largest(candidate, *one, options)
        patterns.append(pattern)
        lists.append(of_list)
        fits.append(does_fit)
    index = layer_plan(lists, k_KNE, options.policy).index(0, q_NHE)
    out_NHE, lse_NH = sparse_prefill_attention(q_NHE, k_KNE, attention.v_KNE, index)
    exact_NHE = attention.out_NHE.float()
    error_NH = (out_NHE.float() - exact_NHE).norm(dim=2) / exact_NHE.norm(dim=2).clamp_min(1e-30)
    recall_NH = (lse_NH - attention.lse_NH).exp().clamp_max(1.0)
    return _Tried(patterns, torch.tensor(fits), recall_NH.mean(dim=0), error_NH.mean(dim=0))


def _largest(
    candidate: HeadPattern,
    q_N1E: Tensor,
    k_1NE: Tensor,
    vertical_1N: Tensor,
    slash_1N: Tensor,
    options: SearchOptions,
) -> tuple[HeadPattern, ListPlan, bool]:
    """The largest size of a candidate whose index is within the budget, by bisection: larger ones list no less.

    Returns:
        The pattern, its list, and whether it is within the budget: the smallest may not be.
    """

    def sized(largest: int) -> tuple[HeadPattern, ListPlan, bool]:
        pattern = _scaled(candidate, largest)
        of_list = list_of((pattern,), vertical_1N, slash_1N, options.policy)
        density = layer_plan((of_list,), k_1NE, options.policy).index(0, q_N1E).density()
        return pattern, of_list, density <= options.budget

    found, largest, too_large = sized(1), 1, k_1NE.shape[1]
    while found[2] and too_large - largest > 1:
        middle = (largest + too_large) // 2
        tried = sized(middle)
        if tried[2]:
            found, largest = tried, middle
        else:
            too_large = middle
    return found


def _scaled(pattern: HeadPattern, largest: int) -> HeadPattern:
    """In the same proportion, with that larger size, and none below 1."""

    def size(of: int) -> int:
        return max(1, of * largest // max(pattern.sizes))

    match pattern:
        case AShape():
            return AShape(sink_tokens=size(pattern.sink_tokens), local_tokens=size(pattern.local_tokens))
        case VerticalSlash():
            return VerticalSlash(num_verticals=size(pattern.num_verticals), num_slashes=size(pattern.num_slashes))
        case BlockSparse():
            return BlockSparse(num_blocks=size(pattern.num_blocks))
