"""Dense attention of a tile of queries to all keys up to and including the tile.

Shapes: T queries of the tile, S keys (prefix and tile, S >= T), H query heads, K kv heads, D head dim.
"""

import torch
from torch import Tensor

from colm_kernels.checks import check_dims, check_same_dtype


def prefill_attention_reference(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in fp32, with every score held at once; see `prefill_attention`."""
    num_queries, num_heads, head_dim = q_THD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    group = num_heads // num_kv_heads
    k_HSD = k_KSD.float().repeat_interleave(group, dim=0)
    v_HSD = v_KSD.float().repeat_interleave(group, dim=0)
    scores_HTS = q_THD.float().transpose(0, 1) @ k_HSD.transpose(1, 2) * head_dim**-0.5
    future_TS = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
    scores_HTS.masked_fill_(future_TS, float("-inf"))
    out_HTD = scores_HTS.softmax(dim=-1) @ v_HSD
    return out_HTD.transpose(0, 1).to(q_THD.dtype), scores_HTS.logsumexp(dim=-1).T


def prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """Attend a tile of queries to its prefix and, causally, to itself.

    The causal mask is aligned at the bottom right: query t sees keys 0 .. S-T+t.

    Args:
        q_THD: rotated queries; query head h reads kv head h // (H / K).
        k_KSD: rotated keys of the whole prefix and of the tile, kv-head major; any strides with D contiguous.
        v_KSD: values, same layout.

    Returns:
        (out_THD in q's dtype, lse_TH in fp32: the log of each row's softmax denominator).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    num_queries, num_heads, head_dim = q_THD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    check_dims("k_KSD", k_KSD, None, None, head_dim)
    check_dims("v_KSD", v_KSD, num_kv_heads, num_keys, head_dim)
    check_same_dtype(q_THD=q_THD, k_KSD=k_KSD, v_KSD=v_KSD)
    if num_heads % num_kv_heads:
        raise ValueError(f"q_THD has {num_heads} heads, not a multiple of the {num_kv_heads} kv heads")
    if num_keys < num_queries:
        raise ValueError(f"k_KSD has {num_keys} keys, fewer than the {num_queries} queries of the tile")
    q = q_THD.transpose(0, 1).unsqueeze(0)
    k, v = k_KSD.unsqueeze(0), v_KSD.unsqueeze(0)
    num_prefix = num_keys - num_queries
    # SDPA's causal mask is aligned at the top left, so prefix and tile are two calls, merged by their LSE.
    out, lse = _flash(q, k[:, :, num_prefix:], v[:, :, num_prefix:], causal=True)
    if num_prefix:
        prefix_out, prefix_lse = _flash(q, k[:, :, :num_prefix], v[:, :, :num_prefix], causal=False)
        out, lse = _merge(out, lse, prefix_out, prefix_lse)
    return out[0].transpose(0, 1), lse[0].T


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a = (lse_a - lse).exp().unsqueeze(-1)
    weight_b = (lse_b - lse).exp().unsqueeze(-1)
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse
