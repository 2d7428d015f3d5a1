"""Estimates of where attention goes, from a few products; `sparse_patterns` takes them as masses and scores.

Shapes: T queries of the tile, S keys (prefix and tile), H query heads, K kv heads, G = H / K, D head dim, L lists (K or
H), N row blocks, B key blocks, R sampled rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_kernels.prefill_attention import check_prefill
from colm_kernels.sparse_index import Tiling


def vertical_slash_mass(q_THD: Tensor, k_KSD: Tensor, *, num_lists: int, num_rows: int = 64) -> tuple[Tensor, Tensor]:
    """Attention of the tile's last rows by key position and by distance (Jiang et al. 2024, algorithm 2).

    Args:
        q_THD: rotated queries.
        k_KSD: rotated keys of the prefix and the tile.
        num_lists: H, or K to add up the query heads of a kv head.
        num_rows: how many of the last queries are used.

    Returns:
        (vertical_LS, slash_LS) in fp32. Each row sums to the number of queries used, times G where L = K. Entry s of
        the second is the attention at distance s.

    Raises:
        ValueError: shapes that do not fit together.
    """
    group = _check(q_THD, k_KSD, num_lists)
    rows_RHD = q_THD[-num_rows:].float()
    num_rows, num_heads, head_dim = rows_RHD.shape
    num_keys = k_KSD.shape[1]
    vertical_HS = torch.empty(num_heads, num_keys, device=q_THD.device)
    slash_HS = torch.empty_like(vertical_HS)
    future_RS = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q_THD.device).triu(num_keys - num_rows + 1)
    # Head by head: R x S numbers take much memory at a million keys.
    for head in range(num_heads):
        scores_RS = rows_RHD[:, head] @ k_KSD[head // group].float().T * head_dim**-0.5
        weights_RS = scores_RS.masked_fill_(future_RS, float("-inf")).softmax(dim=1)
        vertical_HS[head] = weights_RS.sum(dim=0)
        # Read from the last key back, row r begins at distance -(R - 1 - r), so entries of equal distance lie a fixed
        # step apart in memory.
        padded_RX = F.pad(weights_RS.flip(1), (0, num_rows))
        width = num_keys + num_rows
        slash_HS[head] = padded_RX.as_strided((num_rows, num_keys), (width - 1, 1), num_rows - 1).sum(dim=0)
    return _by_list(vertical_HS, num_lists), _by_list(slash_HS, num_lists)


def pooled_block_mass(q_THD: Tensor, k_KSD: Tensor, tiling: Tiling, *, num_lists: int) -> Tensor:
    """Attention by key block between mean queries and mean keys of the blocks.

    Args:
        q_THD: rotated queries.
        k_KSD: rotated keys of the prefix and the tile.
        tiling: of this T and S.
        num_lists: H, or K to average the query heads of a kv head.

    Returns:
        mass_LNB in fp32; each row block's masses sum to 1 over the key blocks that it can see.

    Raises:
        ValueError: shapes that do not fit together.
    """
    group = _check(q_THD, k_KSD, num_lists)
    if (tiling.num_queries, tiling.num_keys) != (q_THD.shape[0], k_KSD.shape[1]):
        raise ValueError(f"tiling={tiling} does not fit {q_THD.shape[0]} queries and {k_KSD.shape[1]} keys")
    q_HND = _block_means(q_THD.transpose(0, 1), tiling.row_block)
    k_HBD = _block_means(k_KSD, tiling.key_block).repeat_interleave(group, dim=0)
    scores_HNB = q_HND @ k_HBD.transpose(1, 2) * q_THD.shape[2] ** -0.5
    _, last_N = tiling.diagonal(q_THD.device)
    future_NB = torch.arange(tiling.num_key_blocks, device=q_THD.device) > last_N.unsqueeze(1)
    mass_HNB = scores_HNB.masked_fill_(future_NB, float("-inf")).softmax(dim=2)
    return _by_list(mass_HNB, num_lists) * (num_lists / len(mass_HNB))


def _check(q_THD: Tensor, k_KSD: Tensor, num_lists: int) -> int:
    check_prefill(q_THD, k_KSD, k_KSD)
    num_heads, num_kv_heads = q_THD.shape[1], k_KSD.shape[0]
    if num_lists not in (num_kv_heads, num_heads):
        raise ValueError(f"num_lists={num_lists} must be the {num_kv_heads} kv heads or the {num_heads} query heads")
    return num_heads // num_kv_heads


def _by_list(x_H: Tensor, num_lists: int) -> Tensor:
    x_L: Tensor = x_H.unflatten(0, (num_lists, -1)).sum(dim=1)
    return x_L


def _block_means(x_HXD: Tensor, block: int) -> Tensor:
    """Mean of every run of `block` tokens in fp32; the last run may be shorter."""
    whole = x_HXD.shape[1] // block * block
    means = [x_HXD[:, :whole].float().unflatten(1, (-1, block)).mean(dim=2)]
    if whole < x_HXD.shape[1]:
        means.append(x_HXD[:, whole:].float().mean(dim=1, keepdim=True))
    return torch.cat(means, dim=1)
