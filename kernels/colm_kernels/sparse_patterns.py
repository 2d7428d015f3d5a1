"""Sparse patterns: each lowers to a `SparseIndex` that lists all the keys that the pattern asks for.

A pattern is given in tokens and listed in whole blocks (and single columns), so a few more keys are attended to.

Shapes: L lists (kv heads or query heads), N row blocks, B key blocks, S keys, V verticals, W slashes.
"""

import torch
from torch import Tensor

from colm_kernels.sparse_index import SparseIndex, Tiling, lower


def a_shape(tiling: Tiling, *, num_lists: int, sink_tokens: int, local_tokens: int) -> SparseIndex:
    """The first keys and the nearest ones (Xiao et al. 2023, "attention sinks"), the same in every list.

    Args:
        tiling: positions and blocks.
        num_lists: L.
        sink_tokens: keys 0 .. sink_tokens - 1 are attended to by every query.
        local_tokens: the last keys up to and including the query's own are attended to as well; at least 1.

    Raises:
        ValueError: a count out of its range.
    """
    if sink_tokens < 0 or local_tokens < 1:
        raise ValueError(f"sink_tokens={sink_tokens} must be at least 0 and local_tokens={local_tokens} at least 1")
    block_B = torch.arange(tiling.num_key_blocks)
    first_local_N1 = (tiling.first_positions() - (local_tokens - 1)).clamp_min(0).unsqueeze(1) // tiling.key_block
    mask_NB = (block_B * tiling.key_block < sink_tokens) | (block_B >= first_local_N1)
    return lower(tiling, mask_NB.expand(num_lists, -1, -1))


def vertical_slash(tiling: Tiling, *, verticals_LV: Tensor, slashes_LW: Tensor) -> SparseIndex:
    """Key columns that every query attends to, and diagonals at fixed distances (Jiang et al. 2024, MInference).

    Args:
        tiling: positions and blocks.
        verticals_LV: int64 key positions, in any order; negative ones are padding.
        slashes_LW: int64 distances: a query at position p attends to key p - distance where there is one; 0 is the
            query's own. Any order; negative ones are padding.

    Raises:
        ValueError: lists of different numbers, or a vertical past the last key.

    Example: slashes [0, 100] and key_block=64: queries at 256-383 are given blocks 2, 3 (keys 156-283) and 4, 5.
    """
    if verticals_LV.dim() != 2 or slashes_LW.dim() != 2 or len(verticals_LV) != len(slashes_LW):
        raise ValueError(
            f"verticals_LV has shape {tuple(verticals_LV.shape)} and slashes_LW {tuple(slashes_LW.shape)}; "
            f"both need one row a list"
        )
    device = slashes_LW.device
    mask_LNB = blocks_at_distances(
        tiling.first_positions(device),
        tiling.last_positions(device),
        slashes_LW,
        slashes_LW,
        num_key_blocks=tiling.num_key_blocks,
        key_block=tiling.key_block,
    )
    return lower(tiling, mask_LNB, verticals_LV)


def blocks_at_distances(
    first_N: Tensor, last_N: Tensor, nearest_LW: Tensor, farthest_LW: Tensor, *, num_key_blocks: int, key_block: int
) -> Tensor:
    """Key blocks that hold a key at one of the listed distances from some query of a row block.

    Args:
        first_N: int64 position of each row block's first query.
        last_N: of its last one.
        nearest_LW: int64 distances at which ranges begin; negative ones are padding.
        farthest_LW: the last distance of each range.
        num_key_blocks: B.
        key_block: keys of a block.

    Returns:
        mask_LNB, bool. Keys before the first are not there.
    """
    device = nearest_LW.device
    # A spare entry at the end takes the marks of padding and of distances past the first key.
    edges_LNB = torch.zeros((len(nearest_LW), len(first_N), num_key_blocks + 1), dtype=torch.int32, device=device)
    nearest_LNW, farthest_LNW = (bound_LW.unsqueeze(1) for bound_LW in (nearest_LW, farthest_LW))
    last_key_LNW = last_N.unsqueeze(1) - nearest_LNW
    first_key_LNW = (first_N.unsqueeze(1) - farthest_LNW).clamp_min(0)
    is_there_LNW = (nearest_LNW >= 0) & (last_key_LNW >= 0)
    ones_LNW = is_there_LNW.to(torch.int32)
    begins_LNW = torch.where(is_there_LNW, first_key_LNW // key_block, num_key_blocks)
    ends_LNW = torch.where(is_there_LNW, last_key_LNW // key_block + 1, num_key_blocks)
    edges_LNB.scatter_add_(2, begins_LNW, ones_LNW).scatter_add_(2, ends_LNW, -ones_LNW)
    return edges_LNB.cumsum(2)[:, :, :-1] > 0


def block_sparse(tiling: Tiling, scores_LNB: Tensor, *, num_blocks: int) -> SparseIndex:
    """The key blocks of highest score, equally many for every row block.

    Args:
        tiling: positions and blocks.
        scores_LNB: the highest are taken; scores of the future are ignored.
        num_blocks: wanted besides block 0 and the diagonal; at least 1.

    Raises:
        ValueError: fewer than one block, or scores that do not fit the tiling.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} must be at least 1")
    scores_LNB = scores_LNB.masked_fill(~_elective(tiling, scores_LNB), float("-inf"))
    best_LNX = scores_LNB.topk(min(num_blocks, tiling.num_key_blocks), dim=2).indices
    # If fewer blocks are elective than wanted, topk marks blocks of the future too; `lower` drops those.
    return lower(tiling, torch.zeros_like(scores_LNB, dtype=torch.bool).scatter_(2, best_LNX, True))


def top_p(tiling: Tiling, mass_LNB: Tensor, *, p: float) -> SparseIndex:
    """The fewest key blocks that hold a share p of each row block's attention, block 0 and the diagonal counted in.

    Args:
        tiling: positions and blocks.
        mass_LNB: attention by key block, as estimated; not negative. Need not add up to 1; the future is ignored.
        p: between 0 and 1.

    Raises:
        ValueError: p out of its range, or masses that do not fit the tiling.
    """
    _check_share(p)
    elective_LNB = _elective(tiling, mass_LNB)
    visible_LNB = mass_LNB.masked_fill(~_visible(tiling, mass_LNB), 0.0)
    given_LN = visible_LNB.masked_fill(elective_LNB, 0.0).sum(dim=2)
    wanted_LN = p * visible_LNB.sum(dim=2) - given_LN
    sorted_LNB, order_LNB = visible_LNB.masked_fill(~elective_LNB, 0.0).sort(dim=2, descending=True)
    # A block is taken while the blocks before it hold too little.
    before_LNB = sorted_LNB.cumsum(dim=2) - sorted_LNB
    taken_LNB = before_LNB < wanted_LN.unsqueeze(2)
    return lower(tiling, torch.zeros_like(taken_LNB).scatter_(2, order_LNB, taken_LNB))


def _check_share(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} must be between 0 and 1")


def _visible(tiling: Tiling, scores_LNB: Tensor) -> Tensor:
    expected = (tiling.num_row_blocks, tiling.num_key_blocks)
    if scores_LNB.dim() != 3 or tuple(scores_LNB.shape[1:]) != expected:
        raise ValueError(f"scores have shape {tuple(scores_LNB.shape)}, expected (*, {expected[0]}, {expected[1]})")
    _, last_N = tiling.diagonal(scores_LNB.device)
    return torch.arange(tiling.num_key_blocks, device=scores_LNB.device) <= last_N.unsqueeze(1)


def _elective(tiling: Tiling, scores_LNB: Tensor) -> Tensor:
    """Key blocks that a list need not hold: those of the past other than block 0."""
    visible_NB = _visible(tiling, scores_LNB)
    first_N, _ = tiling.diagonal(scores_LNB.device)
    block_B = torch.arange(tiling.num_key_blocks, device=scores_LNB.device)
    return (visible_NB & (block_B > 0) & (block_B < first_N.unsqueeze(1))).expand_as(scores_LNB)
