"""How much of a layer's attention a plan recalls, estimated from sampled rows before the plan is used.

Shapes: N tokens of the prompt, R sampled rows, H query heads, K kv heads, L lists, G = H / L, E head dim, C keys at
a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from colm_kernels.sparse_estimate import SCORES_AT_ONCE, block_scores
from colm_kernels.steps import Steps
from torch import Tensor

from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.policy import KEY_BLOCK, ROW_BLOCK, AuditPolicy


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
    density = plan.density()
    projected = dim * (1 + (ROW_BLOCK if plan.chooses_by_queries else 0))
    num_rows = policy.num_rows(density, num_tokens, projected)
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
        cost=(int((position_R + 1).sum()) + num_rows * projected) / (density * num_tokens * (num_tokens + 1)),
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

    Both sums are of the same scores but for single columns, whose products are made once more. Row blocks are taken to
    begin at multiples of their size.

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
    q_RHE = queries_of(position_R)
    yield
    group = q_RHE.shape[1] // len(plan.lists)
    position_R, first_R, last_R = position_R.to(device), first_R.to(device), last_R.to(device)
    recalls = []
    for number, of_list in enumerate(plan.lists):
        listed_RB = plan.blocks(number, first_R, last_R, means_RHE)
        q_RGE, k_NE = q_RHE[:, number * group : (number + 1) * group], k_KNE[number * len(k_KNE) // len(plan.lists)]
        recalls.append((yield from _recall(q_RGE, k_NE, position_R, listed_RB, of_list.verticals().unique())))
    recall_RH = torch.empty(len(position_R), q_RHE.shape[1], dtype=torch.float64, device=device)
    recall_RH[descending_R.to(device)] = torch.cat(recalls, dim=1)
    return recall_RH


def _recall(q_RGE: Tensor, k_NE: Tensor, position_R: Tensor, listed_RB: Tensor, columns_V: Tensor) -> Steps[Tensor]:
    """recall_RG of one list, some keys after the others.

    Args:
        q_RGE: queries.
        k_NE: keys.
        position_R: of the rows, the last ones first.
        listed_RB: key blocks.
        columns_V: listed keys, once each; those in listed blocks count once.
    """
    group, num_keys = q_RGE.shape[1], int(position_R[0]) + 1
    q_XE = q_RGE.flatten(0, 1).contiguous()
    position_X = position_R.repeat_interleave(group)
    listed_XB = listed_RB.repeat_interleave(group, dim=0)
    maximum_X = torch.full((len(q_XE),), float("-inf"), dtype=torch.float64, device=k_NE.device)
    all_X, listed_X = torch.zeros_like(maximum_X), torch.zeros_like(maximum_X)
    step = max(1, SCORES_AT_ONCE // (len(q_XE) * KEY_BLOCK)) * KEY_BLOCK
    for begin in range(0, num_keys, step):
        end = min(begin + step, num_keys)
        maximum_XB, sum_XB = block_scores(q_XE, k_NE, position_X, begin, end)
        new_X = torch.maximum(maximum_X, maximum_XB.amax(dim=1).double())
        sum_XB = sum_XB.double() * (maximum_XB - new_X.unsqueeze(1)).exp_()
        shrink_X, maximum_X = (maximum_X - new_X).exp_(), new_X
        all_X = all_X * shrink_X + sum_XB.sum(dim=1)
        is_listed_XB = listed_XB[:, begin // KEY_BLOCK : -(-end // KEY_BLOCK)]
        listed_X = listed_X * shrink_X + (sum_XB * is_listed_XB).sum(dim=1)
        yield
    step = max(1, SCORES_AT_ONCE // len(q_XE))
    for column_C in columns_V.split(step):
        scores_XC = (q_XE.float() * q_XE.shape[1] ** -0.5) @ k_NE[column_C].float().T
        is_alone_XC = (column_C <= position_X.unsqueeze(1)) & ~listed_XB[:, column_C // KEY_BLOCK]
        listed_X += ((scores_XC - maximum_X.unsqueeze(1)).exp_() * is_alone_XC).sum(dim=1)
        yield
    return (listed_X / all_X).clamp_max_(1.0).view(-1, group)
