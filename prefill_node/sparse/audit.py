"""How much of a layer's attention a plan recalls, estimated from sampled rows before the plan is used.

Shapes: N tokens of the prompt, R sampled rows, H query heads, K kv heads, L lists, G = H / L, E head dim, C keys at
a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from colm_kernels.sparse_estimate import SCORES_AT_ONCE
from colm_kernels.steps import Steps
from torch import Tensor
from torch.nn import functional as F

from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.policy import KEY_BLOCK, ROW_BLOCK

MAX_COST = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditPolicy:
    """What an audit promises and what it may cost."""

    floor: float = 0.8
    """Mean recall that every head must have; lists with a head below become dense. 0 only reports."""
    confidence: float = 0.95
    """With this probability a bound holds, for each head and for the layer's mean by itself."""
    max_rows: int = 512
    """Rows looked at; fewer where they would cost too much."""
    max_cost: float = 0.02
    """Products of the audit as a share of those of the layer's sparse attention."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(f"floor={self.floor} must be at least 0 and below 1")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence={self.confidence} must be above 0 and below 1")
        if self.max_rows < 2:
            raise ValueError(f"max_rows={self.max_rows} must be at least 2: one row has no variance")
        if not 0.0 < self.max_cost < MAX_COST:
            raise ValueError(f"max_cost={self.max_cost} must be above 0 and below {MAX_COST}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What the rows of a sample say."""

    num_rows: int
    """R."""
    recall_H: Tensor
    """Mean share of the attention that each head recalls."""
    recall_bound_H: Tensor
    """With the policy's confidence the mean over all rows is no less."""
    recall: float
    """Of the layer: the mean over its heads."""
    recall_bound: float
    """Of the layer."""
    below_floor: tuple[int, ...]
    """Lists, dense ones apart, of which some head's bound is below the floor."""
    cost: float
    """Products of the audit as a share of those of the layer's sparse attention."""


def audit(
    plan: LayerPlan,
    queries_of: Callable[[Tensor], Tensor],
    k_KNE: Tensor,
    *,
    dim: int,
    policy: AuditPolicy,
    generator: torch.Generator,
) -> Steps[Audit | None]:
    """Look at rows drawn with replacement, each as likely as any other.

    A row costs its products with all keys before it, and projections to queries. `plan.with_dense(below_floor)` is what
    should be used.

    Args:
        plan: what is audited.
        queries_of: rotated queries q_XHE of int64 positions, in any order and more than once.
        k_KNE: rotated keys of the whole prompt.
        dim: width that queries are projected from; a projected query costs as much as so many keys.
        policy: the promise and its price.
        generator: on the CPU, draws the rows.

    Returns:
        What the rows say; None where not even two may be looked at for the price, and the layer had better be dense.
    """
    num_tokens = plan.num_tokens
    # In products of one query with one key, for every head; attention makes two, with the key and with its value.
    attention = plan.density() * num_tokens * (num_tokens + 1)
    projected = dim * (1 + (ROW_BLOCK if plan.chooses_by_queries else 0))
    num_rows = min(policy.max_rows, int(policy.max_cost * attention / (num_tokens + projected)))
    if num_rows < 2:
        return None
    position_R = torch.randint(num_tokens, (num_rows,), generator=generator)
    recall_RH = yield from recall_of_rows(plan, position_R, queries_of, k_KNE)
    bound_H = lower_bound(recall_RH, policy.confidence)
    mean_R1 = recall_RH.mean(dim=1, keepdim=True)
    is_below_L = (bound_H < policy.floor).view(len(plan.lists), -1).any(dim=1).tolist()
    return Audit(
        num_rows=num_rows,
        recall_H=recall_RH.mean(dim=0),
        recall_bound_H=bound_H,
        recall=float(mean_R1.mean()),
        recall_bound=float(lower_bound(mean_R1, policy.confidence)),
        below_floor=tuple(i for i, of_list in enumerate(plan.lists) if is_below_L[i] and not of_list.is_dense),
        cost=(int((position_R + 1).sum()) + num_rows * projected) / attention,
    )


def lower_bound(values_RX: Tensor, confidence: float) -> Tensor:
    """What each column's mean is not below, with that confidence, given independent rows of values from 0 to 1.

    The empirical Bernstein bound (Maurer and Pontil 2009, theorem 4): with probability 1 - d at least

        mean >= sample mean - sqrt(2 V ln(2 / d) / R) - 7 ln(2 / d) / (3 (R - 1)),

    V being the sample variance over R - 1. Close where the values vary little, as recalls near 1 do.

    Returns:
        bound_X, float64, not below 0.
    """
    num_rows, log = len(values_RX), math.log(2.0 / (1.0 - confidence))
    variance_X, mean_X = torch.var_mean(values_RX.double(), dim=0)
    bound_X = mean_X - (2.0 * variance_X * log / num_rows).sqrt() - 7.0 * log / (3.0 * (num_rows - 1))
    return bound_X.clamp_min_(0.0)


def recall_of_rows(
    plan: LayerPlan, position_R: Tensor, queries_of: Callable[[Tensor], Tensor], k_KNE: Tensor
) -> Steps[Tensor]:
    """Share of each row's attention that a plan recalls: exp(lse over what is listed - lse over all).

    One pass over the keys gives both sums, so they are of the same scores. Row blocks are taken to begin at multiples
    of their size.

    Args:
        plan: what is listed.
        position_R: int64, the rows.
        queries_of: as of `audit`.
        k_KNE: rotated keys of the whole prompt.

    Returns:
        recall_RH, float64, from 0 to 1.
    """
    device = k_KNE.device
    # The last rows first: those that see the keys from some place on are then the first of them.
    descending_R = position_R.argsort(descending=True)
    position_R = position_R[descending_R]
    first_R = position_R // ROW_BLOCK * ROW_BLOCK
    last_R = (first_R + ROW_BLOCK - 1).clamp_max(plan.num_tokens - 1)
    means_RHE = None
    if plan.chooses_by_queries:
        means = []
        for first, last in zip(first_R.tolist(), last_R.tolist(), strict=True):
            means.append(queries_of(torch.arange(first, last + 1)).float().mean(dim=0))
            yield
        means_RHE = torch.stack(means)
    q_RHE = queries_of(position_R).float() * k_KNE.shape[2] ** -0.5
    yield
    group = q_RHE.shape[1] // len(plan.lists)
    first_R, last_R = first_R.to(device), last_R.to(device)
    recalls = []
    for number, of_list in enumerate(plan.lists):
        listed_RB = plan.blocks(number, first_R, last_R, means_RHE)
        q_GRE = q_RHE[:, number * group : (number + 1) * group].transpose(0, 1).contiguous()
        k_NE = k_KNE[number * len(k_KNE) // len(plan.lists)]
        recalls.append((yield from _recall(q_GRE, k_NE, position_R, listed_RB, of_list.verticals().unique())))
    recall_RH = torch.empty(len(position_R), q_RHE.shape[1], dtype=torch.float64, device=device)
    recall_RH[descending_R.to(device)] = torch.cat(recalls).T
    return recall_RH


def _recall(q_GRE: Tensor, k_NE: Tensor, position_R: Tensor, listed_RB: Tensor, columns_V: Tensor) -> Steps[Tensor]:
    """recall_GR of one list, some keys after the others.

    Args:
        q_GRE: scaled queries.
        k_NE: keys.
        position_R: of the rows, on the CPU, the last ones first.
        listed_RB: key blocks.
        columns_V: listed keys, in order; those in listed blocks count once.
    """
    group, num_rows, _ = q_GRE.shape
    maximum_GR = torch.full((group, num_rows), float("-inf"), dtype=torch.float64, device=k_NE.device)
    all_GR, listed_GR = torch.zeros_like(maximum_GR), torch.zeros_like(maximum_GR)
    positions, position_R1 = position_R.numpy(), position_R.to(k_NE.device).unsqueeze(1)
    step = max(1, SCORES_AT_ONCE // (group * num_rows * KEY_BLOCK)) * KEY_BLOCK
    for start in range(0, int(positions[0]) + 1, step):
        stop = min(start + step, len(k_NE))
        seeing, seeing_all = (int(np.searchsorted(-positions, -at, side="right")) for at in (start, stop - 1))
        scores_GXC = q_GRE[:, :seeing] @ k_NE[start:stop].float().T
        key_C = torch.arange(start, stop, device=k_NE.device)
        is_future_XC = key_C > position_R1[seeing_all:seeing]
        scores_GXC[:, seeing_all:].masked_fill_(is_future_XC, float("-inf"))
        old_GX = maximum_GR[:, :seeing].clone()
        new_GX = torch.maximum(old_GX, scores_GXC.amax(dim=2).double())
        weights_GXC = scores_GXC.sub_(new_GX.float().unsqueeze(2)).exp_()
        in_blocks_GXB = F.pad(weights_GXC, (0, (start - stop) % KEY_BLOCK)).unflatten(2, (-1, KEY_BLOCK)).sum(dim=3)
        listed_XB = listed_RB[:seeing, start // KEY_BLOCK : -(-stop // KEY_BLOCK)]
        column_V = columns_V[(columns_V >= start) & (columns_V < stop)] - start
        alone_XV = ~listed_XB[:, column_V // KEY_BLOCK]
        shrink_GX = (old_GX - new_GX).exp_()
        maximum_GR[:, :seeing] = new_GX
        all_GX, listed_GX = all_GR[:, :seeing], listed_GR[:, :seeing]
        all_GX.mul_(shrink_GX).add_(in_blocks_GXB.sum(dim=2))
        listed_GX.mul_(shrink_GX).add_((in_blocks_GXB * listed_XB).sum(dim=2))
        listed_GX.add_((weights_GXC[:, :, column_V] * alone_XV).sum(dim=2))
        yield
    return (listed_GR / all_GR).clamp_max_(1.0)
