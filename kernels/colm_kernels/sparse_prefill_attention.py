"""Attention of a tile of queries to some of the keys up to and including the tile.

Shapes: T queries of the tile, S keys (prefix and tile, S >= T), H query heads, K kv heads, D head dim, L lists of the
index (K or H).
"""

import ctypes

import torch
from torch import Tensor

from colm_kernels.checks import check_no_gradient
from colm_kernels.native import CancelFlag, Cancelled, Variant, call, choose_variant, resolve_num_threads
from colm_kernels.prefill_attention import PrefillArgs, check_prefill, new_outputs, prefill_args
from colm_kernels.sparse_index import SparseIndex


class SparsePrefillArgs(ctypes.Structure):
    """`SparsePrefillArgs` of abi.h."""

    _fields_ = (
        ("dense", PrefillArgs),
        *((name, ctypes.c_void_p) for name in ("block_offsets", "block_ids", "column_offsets", "column_ids")),
        *((name, ctypes.c_int64) for name in ("num_lists", "row_block", "key_block")),
    )


def sparse_prefill_attention_reference(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, index: SparseIndex
) -> tuple[Tensor, Tensor]:
    """The definition in fp32 (float64 for float64), with every score held at once; see `sparse_prefill_attention`."""
    num_heads, head_dim = q_THD.shape[1:]
    group = num_heads // k_KSD.shape[0]
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    k_HSD = k_KSD.to(wide).repeat_interleave(group, dim=0)
    v_HSD = v_KSD.to(wide).repeat_interleave(group, dim=0)
    scores_HTS = q_THD.to(wide).transpose(0, 1) @ k_HSD.transpose(1, 2) * head_dim**-0.5
    mask_HTS = index.mask().repeat_interleave(num_heads // index.num_lists, dim=0)
    scores_HTS.masked_fill_(~mask_HTS, float("-inf"))
    out_HTD = scores_HTS.softmax(dim=-1) @ v_HSD
    return out_HTD.transpose(0, 1).to(q_THD.dtype), scores_HTS.logsumexp(dim=-1).T


def sparse_prefill_attention(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    index: SparseIndex,
    *,
    num_threads: int | None = None,
    cancelled: CancelFlag | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend a tile of queries to the keys that an index lists, causally; all heads in one call.

    Args:
        q_THD: rotated queries, bf16 or fp32, on CUDA fp16 too, any strides; query head h reads kv head h // (H / K).
        k_KSD: rotated keys of the whole prefix and of the tile, kv-head major; any strides with D contiguous.
        v_KSD: values, same layout.
        index: for this T and S; L is K (query heads that share a kv head share its lists) or H.
        num_threads: None takes PyTorch's setting; ignored on CUDA.
        cancelled: as in `prefill_attention`.

    Returns:
        (out_THD in q's dtype, lse_TH in fp32: the log of each row's softmax denominator over the keys it attends to,
        so exp(lse - dense lse) is the share of attention that the index recalls). Accumulates in fp32; error budget
        in tolerance.py.

    Raises:
        ValueError: shapes, strides, dtypes or an index that do not fit together.
        Cancelled: `cancelled` was set before the end.
    """
    check_prefill(q_THD, k_KSD, v_KSD)
    _check_index(q_THD, k_KSD, index)
    if q_THD.is_cuda:
        from colm_kernels.gpu import sparse_prefill_attention as on_gpu

        check_no_gradient(q_THD=q_THD, k_KSD=k_KSD, v_KSD=v_KSD)
        if cancelled is not None and cancelled.is_set():
            raise Cancelled("sparse_prefill_attention")
        return on_gpu.sparse_prefill_attention(q_THD, k_KSD, v_KSD, index)
    threads = resolve_num_threads(num_threads)
    variant = choose_variant(q_THD.shape[2], q_THD, k_KSD, v_KSD)
    if variant == "torch" or q_THD.numel() == 0:
        return _in_torch(q_THD, k_KSD, v_KSD, index, cancelled)
    return _in_library(q_THD, k_KSD, v_KSD, index, variant, threads, cancelled)


def _check_index(q_THD: Tensor, k_KSD: Tensor, index: SparseIndex) -> None:
    num_queries, num_heads, _ = q_THD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    tiling = index.tiling
    if (tiling.num_queries, tiling.num_keys) != (num_queries, num_keys):
        raise ValueError(
            f"index is of {tiling.num_queries} queries and {tiling.num_keys} keys, q_THD and k_KSD hold "
            f"{num_queries} and {num_keys}"
        )
    if index.num_lists not in (num_kv_heads, num_heads):
        raise ValueError(
            f"index has {index.num_lists} lists a row block, expected one a kv head ({num_kv_heads}) or one a query "
            f"head ({num_heads})"
        )
    if index.device != q_THD.device:
        raise ValueError(f"index is on {index.device}, expected {q_THD.device} as q_THD")


def _in_library(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    index: SparseIndex,
    variant: Variant,
    num_threads: int,
    cancelled: CancelFlag | None,
) -> tuple[Tensor, Tensor]:
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    out_THD, lse_TH = new_outputs(q_THD)
    args = SparsePrefillArgs(
        dense=prefill_args(q_THD, k_KSD, v_KSD, out_THD, lse_TH, cancelled),
        block_offsets=index.block_offsets.data_ptr(),
        block_ids=index.block_ids.data_ptr(),
        column_offsets=index.column_offsets.data_ptr(),
        column_ids=index.column_ids.data_ptr(),
        num_lists=index.num_lists,
        row_block=index.tiling.row_block,
        key_block=index.tiling.key_block,
    )
    call("colm_sparse_prefill_attention", args, variant, num_threads)
    return out_THD, lse_TH


def _in_torch(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, index: SparseIndex, cancelled: CancelFlag | None
) -> tuple[Tensor, Tensor]:
    """The path without a compiled library: list by list, its keys copied together, then plain products in fp32."""
    tiling = index.tiling
    num_heads, head_dim = q_THD.shape[1:]
    heads_per_list, group = num_heads // index.num_lists, num_heads // k_KSD.shape[0]
    out_THD, lse_TH = new_outputs(q_THD)
    first_positions = tiling.first_positions().tolist()
    within = torch.arange(tiling.key_block)
    for found in range(index.num_lists * tiling.num_row_blocks):
        if cancelled is not None and cancelled.is_set():
            raise Cancelled("sparse_prefill_attention")
        number, row_block = divmod(found, tiling.num_row_blocks)
        heads = slice(number * heads_per_list, (number + 1) * heads_per_list)
        rows = slice(row_block * tiling.row_block, (row_block + 1) * tiling.row_block)
        blocks = index.block_ids[index.block_offsets[found] : index.block_offsets[found + 1]].long()
        columns = index.column_ids[index.column_offsets[found] : index.column_offsets[found + 1]].long()
        keys_X = torch.cat((columns, (blocks.unsqueeze(1) * tiling.key_block + within).flatten()))
        keys_X = keys_X[keys_X < tiling.num_keys]
        kv_head = heads.start // group
        q_GRD = q_THD[rows, heads].float().transpose(0, 1) * head_dim**-0.5
        scores_GRX = q_GRD @ k_KSD[kv_head, keys_X].float().T
        positions_R = first_positions[row_block] + torch.arange(q_GRD.shape[1])
        scores_GRX.masked_fill_(keys_X > positions_R.unsqueeze(1), float("-inf"))
        out_THD[rows, heads] = (
            (scores_GRX.softmax(dim=-1) @ v_KSD[kv_head, keys_X].float()).transpose(0, 1).to(q_THD.dtype)
        )
        lse_TH[rows, heads] = scores_GRX.logsumexp(dim=-1).T
    return out_THD, lse_TH
