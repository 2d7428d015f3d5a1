"""Estimates of where attention goes, from a few products; `sparse_patterns` takes them as masses and scores.

Shapes: T queries of the tile, S keys (prefix and tile), H query heads, K kv heads, G = H / K, D head dim, L lists (K or
H), R sampled rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_kernels.prefill_attention import check_prefill

SCORES_AT_ONCE = 1 << 22
"""Scores of sampled rows held at a time, 16 MiB of them."""


def last_rows_attention(q_THD: Tensor, k_KSD: Tensor, *, num_rows: int = 64) -> Iterator[tuple[int, Tensor]]:
    """Attention of the tile's last rows, a few of one head at a time: R x S numbers are much at a million keys.

    Args:
        q_THD: rotated queries.
        k_KSD: rotated keys of the prefix and the tile.
        num_rows: how many of the last queries are asked.

    Yields:
        (query head, weights_RX) in fp32: of R consecutive queries, over the X keys up to the last one's own. Heads come
        in order, and a head's rows.

    Raises:
        ValueError: shapes that do not fit together.
    """
    group = _check(q_THD, k_KSD, q_THD.shape[1])
    rows_RHD = q_THD[-num_rows:]
    num_rows, _, head_dim = rows_RHD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    step = max(1, SCORES_AT_ONCE // num_keys)
    for kv_head in range(num_kv_heads):
        k_SD = k_KSD[kv_head].float()
        for head in range(kv_head * group, (kv_head + 1) * group):
            for start in range(0, num_rows, step):
                q_RD = rows_RHD[start : start + step, head].float()
                num_seen = num_keys - num_rows + start + len(q_RD)
                scores_RX = q_RD @ k_SD[:num_seen].T * head_dim**-0.5
                future_RX = torch.ones_like(scores_RX, dtype=torch.bool).triu_(num_seen - len(q_RD) + 1)
                yield head, scores_RX.masked_fill_(future_RX, float("-inf")).softmax(dim=1)


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
    _check(q_THD, k_KSD, num_lists)
    heads_per_list = q_THD.shape[1] // num_lists
    vertical_LS = torch.zeros(num_lists, k_KSD.shape[1], device=q_THD.device)
    slash_LS = torch.zeros_like(vertical_LS)
    for head, weights_RX in last_rows_attention(q_THD, k_KSD, num_rows=num_rows):
        rows, num_seen = weights_RX.shape
        vertical_LS[head // heads_per_list, :num_seen] += weights_RX.sum(dim=0)
        # Read from the last key back, row r begins at distance -(R - 1 - r), so entries of equal distance lie a fixed
        # step apart in memory.
        padded_RX = F.pad(weights_RX.flip(1), (0, rows))
        by_distance_RX = padded_RX.as_strided((rows, num_seen), (num_seen + rows - 1, 1), rows - 1)
        slash_LS[head // heads_per_list, :num_seen] += by_distance_RX.sum(dim=0)
    return vertical_LS, slash_LS


def _check(q_THD: Tensor, k_KSD: Tensor, num_lists: int) -> int:
    check_prefill(q_THD, k_KSD, k_KSD)
    num_heads, num_kv_heads = q_THD.shape[1], k_KSD.shape[0]
    if num_lists not in (num_kv_heads, num_heads):
        raise ValueError(f"num_lists={num_lists} must be the {num_kv_heads} kv heads or the {num_heads} query heads")
    return num_heads // num_kv_heads


def block_means(x_HXD: Tensor, block: int) -> Tensor:
    """Mean of every run of `block` tokens in fp32; the last run may be shorter."""
    whole = x_HXD.shape[1] // block * block
    means = [x_HXD[:, :whole].float().unflatten(1, (-1, block)).mean(dim=2)]
    if whole < x_HXD.shape[1]:
        means.append(x_HXD[:, whole:].float().mean(dim=1, keepdim=True))
    return torch.cat(means, dim=1)
