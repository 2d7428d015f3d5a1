"""Which key columns and which diagonals a head needs, from the attention of the prompt's last rows.

Shapes: R rows, G query heads of one kv head, S keys, E head dim, V verticals, W ranges of distances,
C candidates.
"""

from typing import NamedTuple

import torch
from colm_kernels.native import CancelFlag
from colm_kernels.sparse_estimate import last_rows_attention, vertical_slash_mass
from torch import Tensor
from torch.nn import functional as F

from prefill_node.sparse.patterns import VerticalSlash
from prefill_node.sparse.policy import KEY_BLOCK, SLASH_KEYS, SparsePolicy

_TINY = 1e-30
"""Keeps what nobody looks at from being divided by nothing."""


class Lines(NamedTuple):
    """Key columns, and diagonals in ranges of distances."""

    verticals_V: Tensor
    """int64 key positions."""
    nearest_W: Tensor
    """int64; range w is the distances from nearest to farthest."""
    farthest_W: Tensor


def heaviest(vertical_S: Tensor, slash_S: Tensor, pattern: VerticalSlash) -> Lines:
    """As many verticals and slashes as a pattern says, those of most attention.

    Args:
        vertical_S: attention by key position.
        slash_S: attention by distance.
        pattern: the numbers, each at most S.
    """
    verticals_V = vertical_S.topk(min(pattern.num_verticals, len(vertical_S))).indices
    distances_X = slash_S.topk(min(pattern.num_slashes, len(slash_S))).indices
    return Lines(verticals_V, *_ranges(distances_X, 1))


def lines_within(q_RGE: Tensor, k_1SE: Tensor, policy: SparsePolicy, *, cancelled: CancelFlag | None = None) -> Lines:
    """The lines that a kv head's query heads share, as few as the policy's budget asks for.

    Candidates are single columns, and diagonals 64 at a time, which together list no more than one of them alone
    does. They are ranked by the attention that they explain for each key that they list. By mass, the fewest are taken
    with which each query head has its share; by keys, as many as there is room for.

    Args:
        q_RGE: queries of the prompt's last rows.
        k_1SE: keys of the whole prompt.
        policy: the budget, and what every row is given anyway.
        cancelled: looked at between some rows and the next.

    Raises:
        Cancelled: `cancelled` was set before the end.
    """
    given_G, gain_GC = _explained(q_RGE, k_1SE, policy, cancelled or CancelFlag())
    num_keys = k_1SE.shape[1]
    cost_C = torch.ones(gain_GC.shape[1], dtype=torch.int64, device=gain_GC.device)
    cost_C[num_keys:] = SLASH_KEYS
    order_C = (gain_GC.sum(dim=0) / cost_C).argsort(descending=True)
    if policy.mass is not None:
        reached_GC = gain_GC[:, order_C].cumsum(dim=1) + given_G.unsqueeze(1)
        reached_GX = torch.cat((given_G.unsqueeze(1), reached_GC), dim=1)
        num_taken = int((reached_GX < policy.mass * len(q_RGE)).sum(dim=1).max())
    else:
        assert policy.keys_per_row is not None, "a policy has one of the two"
        num_taken = int((cost_C[order_C].cumsum(0) <= policy.keys_per_row - policy.given_keys).sum())
    taken_X = order_C[:num_taken]
    is_vertical_X = taken_X < num_keys
    return Lines(taken_X[is_vertical_X], *_ranges((taken_X[~is_vertical_X] - num_keys) * KEY_BLOCK, KEY_BLOCK))


def _explained(q_RGE: Tensor, k_1SE: Tensor, policy: SparsePolicy, cancelled: CancelFlag) -> tuple[Tensor, Tensor]:
    """Attention on what every row is given, and how much of the rest each column and each 64 diagonals explain.

    To a few neighbouring rows, a diagonal looks like as many columns, and a column like as many diagonals. Only one of
    them is there for other rows. So a pair's weight is divided between its column and its diagonal in the ratio of the
    attention on each: next to nothing goes to the wrong one, while what is as wide as the rows are many counts as both.

    Returns:
        (given_G, gain_GC), float64: sums over the rows. C is the S columns, then the diagonals 0-63, 64-127, ..
    """
    (num_rows, group, _), num_keys = q_RGE.shape, k_1SE.shape[1]
    vertical_GS, slash_GS = vertical_slash_mass(q_RGE, k_1SE, num_lists=group, num_rows=num_rows)
    given_G = torch.zeros(group, dtype=torch.float64, device=k_1SE.device)
    gain_GC = given_G.new_zeros(group, num_keys + -(-num_keys // KEY_BLOCK))
    key_S = torch.arange(num_keys, device=k_1SE.device)
    is_sink_S = key_S < max(KEY_BLOCK, policy.sink_tokens)
    for head, weights_RX in last_rows_attention(q_RGE, k_1SE, num_rows=num_rows):
        cancelled.raise_if_set()
        rows, num_seen = weights_RX.shape
        # Those of the future have no weight.
        distance_RX = (key_S[num_seen - rows : num_seen].unsqueeze(1) - key_S[:num_seen]).clamp_min_(0)
        is_given_RX = is_sink_S[:num_seen] | (distance_RX < policy.local_tokens)
        rest_RX = weights_RX.masked_fill(is_given_RX, 0.0)
        given_G[head] += weights_RX.sum(dtype=torch.float64) - rest_RX.sum(dtype=torch.float64)
        vertical_X, slash_RX = vertical_GS[head, :num_seen] + _TINY, slash_GS[head][distance_RX] + _TINY
        of_vertical_RX = rest_RX * (vertical_X / (vertical_X + slash_RX))
        gain_GC[head, :num_seen] += of_vertical_RX.sum(dim=0)
        of_slash_X = (rest_RX - of_vertical_RX).flatten().double()
        gain_GC[head, num_keys:].scatter_add_(0, (distance_RX // KEY_BLOCK).flatten(), of_slash_X)
    return given_G, gain_GC


def _ranges(starts_X: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Runs of distances, each `width` from its start on, joined where they touch: (nearest_W, farthest_W)."""
    starts_X = starts_X.sort().values
    gap_X = starts_X.diff() > width
    is_first_X, is_last_X = F.pad(gap_X, (1, 0), value=True), F.pad(gap_X, (0, 1), value=True)
    if not len(starts_X):
        return starts_X, starts_X
    return starts_X[is_first_X], starts_X[is_last_X] + width - 1
