"""Which key columns and which diagonals a head needs, from the attention of the prompt's last rows.

Shapes: R rows, G query heads of one kv head, S keys, E head dim, V verticals, W ranges of distances,
C candidates.
"""

from typing import NamedTuple

import torch
from colm_kernels.sparse_estimate import LastRows
from colm_kernels.steps import Steps
from torch import Tensor
from torch.nn import functional as F

from prefill_node.sparse.patterns import VerticalSlash
from prefill_node.sparse.policy import KEY_BLOCK, SLASH_KEYS, SparsePolicy

NUM_PASSES = 3
"""Over the keys, for a head: the rows' sums, columns and diagonals, and how each pair is divided between the two."""
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


def lines_within(q_RGE: Tensor, k_SE: Tensor, policy: SparsePolicy) -> Steps[Lines]:
    """The lines that a kv head's query heads share, as few as the policy's budget asks for.

    Candidates are single columns, and diagonals 64 at a time, which together list no more than one of them alone
    does. They are ranked by the attention that they explain for each key that they list. By mass, the fewest are taken
    with which each query head has its share; by keys, as many as there is room for.

    Args:
        q_RGE: queries of the prompt's last rows.
        k_SE: keys of the whole prompt.
        policy: the budget, and what every row is given anyway.
    """
    given_G, gain_GC = yield from _explained(q_RGE, k_SE, policy)
    num_keys = len(k_SE)
    worth_C = gain_GC.sum(dim=0)
    worth_C[num_keys:] /= SLASH_KEYS
    if policy.mass is not None:
        order_C = worth_C.argsort(descending=True)
        yield
        reached_GC = gain_GC[:, order_C].cumsum(dim=1) + given_G.unsqueeze(1)
        reached_GX = torch.cat((given_G.unsqueeze(1), reached_GC), dim=1)
        num_taken = int((reached_GX < policy.mass * len(q_RGE)).sum(dim=1).max())
    else:
        assert policy.keys_per_row is not None, "a policy has one of the two"
        room_keys = policy.keys_per_row - policy.given_keys
        # No more than there are keys, and to find the best few is quicker than to sort a million.
        order_C = worth_C.topk(min(room_keys, len(worth_C))).indices
        cost_C = torch.where(order_C < num_keys, 1, SLASH_KEYS)
        num_taken = int((cost_C.cumsum(0) <= room_keys).sum())
    taken_X = order_C[:num_taken]
    is_vertical_X = taken_X < num_keys
    return Lines(taken_X[is_vertical_X], *_ranges((taken_X[~is_vertical_X] - num_keys) * KEY_BLOCK, KEY_BLOCK))


def _explained(q_RGE: Tensor, k_SE: Tensor, policy: SparsePolicy) -> Steps[tuple[Tensor, Tensor]]:
    """Attention on what every row is given, and how much of the rest each column and each 64 diagonals explain.

    To a few neighbouring rows, a diagonal looks like as many columns, and a column like as many diagonals. Only one of
    them is there for other rows. So a pair's weight is divided between its column and its diagonal in the ratio of the
    attention on each: next to nothing goes to the wrong one, while what is as wide as the rows are many counts as both.

    Returns:
        (given_G, gain_GC), float64: sums over the rows. C is the S columns, then the diagonals 0-63, 64-127, ..
    """
    num_rows, group, _ = q_RGE.shape
    num_first = max(KEY_BLOCK, policy.sink_tokens)
    gains = []
    for head in range(group):
        rows = LastRows(q_RGE[:, head], k_SE)
        yield from rows.normalise()
        vertical_S, diagonal_X = yield from rows.masses()
        vertical_S += _TINY
        diagonal_X += _TINY
        # Weight w of column v and diagonal d is divided into v * w / (v + d) and d * w / (v + d): v and d are the same
        # for a whole column and a whole diagonal, so they can wait until the quotients have been added up.
        by_column_S, by_diagonal_X = yield from rows.quotients(
            vertical_S, diagonal_X, num_first=num_first, num_nearest=policy.local_tokens
        )
        by_distance_S = (by_diagonal_X * diagonal_X)[: rows.num_keys].flip(0)
        in_slashes_BX = F.pad(by_distance_S, (0, -rows.num_keys % KEY_BLOCK)).unflatten(0, (-1, KEY_BLOCK))
        gains.append(torch.cat((by_column_S * vertical_S, in_slashes_BX.sum(dim=1))).double())
    gain_GC = torch.stack(gains)
    # A row's weights add up to one, and each is either given or explained.
    return num_rows - gain_GC.sum(dim=1), gain_GC


def _ranges(starts_X: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Runs of distances, each `width` from its start on, joined where they touch: (nearest_W, farthest_W)."""
    starts_X = starts_X.sort().values
    gap_X = starts_X.diff() > width
    is_first_X, is_last_X = F.pad(gap_X, (1, 0), value=True), F.pad(gap_X, (0, 1), value=True)
    if not len(starts_X):
        return starts_X, starts_X
    return starts_X[is_first_X], starts_X[is_last_X] + width - 1
