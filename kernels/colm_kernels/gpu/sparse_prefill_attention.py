"""Sparse prefill attention in Triton, every head in one launch; see colm_kernels/sparse_prefill_attention.py.

Shapes: T queries of the tile, S keys (prefix and tile, S >= T), H query heads, K kv heads, D head dim, L lists of the
index (K or H), M rows of a program, N keys of a block.

A row is a query token and one of its list's query heads; a row block is one program or several, each of which reads the
listed blocks up to its own last query, then the listed columns, gathered N at a time.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from colm_kernels.gpu.device import arch_of, on_its_device
from colm_kernels.gpu.prefill_attention import STRIDES, block_dim
from colm_kernels.gpu.softmax import LN_2, LOG2_E, attend
from colm_kernels.gpu.specimen import ARCHS, Arch, Config, Specimen
from colm_kernels.sparse_index import SparseIndex


@triton.jit
def _sparse_prefill_kernel(
    q, k, v, out, lse, block_offsets, block_ids, column_offsets, column_ids,
    num_queries, num_keys, num_heads, num_kv_heads, num_lists, num_row_blocks, scale_log2,
    q_stride_t, q_stride_h, k_stride_k, k_stride_s, v_stride_k, v_stride_s,
    ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    heads_per_list = num_heads // num_lists
    tiles_per_block = tl.cdiv(ROW_BLOCK * heads_per_list, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles_per_block
    number = program // tiles_per_block % num_lists
    # The last row blocks usually list the most keys. They start first, so that short programs fill the gaps at the end.
    row_block = num_row_blocks - 1 - program // tiles_per_block // num_lists
    first_token = row_block * ROW_BLOCK + tile * BLOCK_M // heads_per_list
    if first_token >= num_queries:
        return
    rows_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_M = (row_block * ROW_BLOCK + rows_M // heads_per_list).to(tl.int64)
    heads_M = number.to(tl.int64) * heads_per_list + rows_M % heads_per_list
    dims_D = tl.arange(0, BLOCK_D)
    # A row block may have fewer rows than a program; the rest belong to the next block.
    is_row_M = (tokens_M < num_queries) & (rows_M < ROW_BLOCK * heads_per_list)
    is_dim_D = dims_D < D
    q_MD = tl.load(
        q + tokens_M[:, None] * q_stride_t + heads_M[:, None] * q_stride_h + dims_D[None, :],
        mask=is_row_M[:, None] & is_dim_D[None, :],
        other=0.0,
    )

    prefix = num_keys - num_queries
    row_block_end = tl.minimum(row_block * ROW_BLOCK + ROW_BLOCK, num_queries)
    first_diagonal = (prefix + row_block * ROW_BLOCK) // KEY_BLOCK
    last_diagonal = (prefix + row_block_end - 1) // KEY_BLOCK
    found = number * num_row_blocks + row_block
    blocks = block_ids + tl.load(block_offsets + found)
    num_blocks = (tl.load(block_offsets + found + 1) - tl.load(block_offsets + found)).to(tl.int32)
    columns = column_ids + tl.load(column_offsets + found)
    num_columns = (tl.load(column_offsets + found + 1) - tl.load(column_offsets + found)).to(tl.int32)

    kv_head = number.to(tl.int64) * num_kv_heads // num_lists
    keys_N = tl.arange(0, BLOCK_N)
    k_D = k + kv_head * k_stride_k + dims_D[None, :]
    v_D = v + kv_head * v_stride_k + dims_D[None, :]
    k_ND = k_D + keys_N[:, None].to(tl.int64) * k_stride_s
    v_ND = v_D + keys_N[:, None].to(tl.int64) * v_stride_s
    out_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    PARTS: tl.constexpr = KEY_BLOCK // BLOCK_N
    num_past = num_blocks - (last_diagonal - first_diagonal + 1)
    for part in tl.range(0, num_past * PARTS):
        start = tl.load(blocks + part // PARTS).to(tl.int64) * KEY_BLOCK + part % PARTS * BLOCK_N
        keys_ND = tl.load(k_ND + start * k_stride_s, mask=is_dim_D[None, :], other=0.0)
        values_ND = tl.load(v_ND + start * v_stride_s, mask=is_dim_D[None, :], other=0.0)
        out_MD, maximum_M, total_M = attend(
            q_MD, keys_ND, values_ND, None, None, None, scale_log2, out_MD, maximum_M, total_M, False, False
        )
    # The keys around the diagonal remain; all of them are listed.
    last_token = tl.minimum(
        (row_block * ROW_BLOCK + (tile * BLOCK_M + BLOCK_M - 1) // heads_per_list), row_block_end - 1
    )
    for start in tl.range(first_diagonal * KEY_BLOCK, prefix + last_token + 1, BLOCK_N):
        at = tl.cast(start, tl.int64)
        is_key_ND = (start + keys_N[:, None] < num_keys) & is_dim_D[None, :]
        keys_ND = tl.load(k_ND + at * k_stride_s, mask=is_key_ND, other=0.0)
        values_ND = tl.load(v_ND + at * v_stride_s, mask=is_key_ND, other=0.0)
        is_seen_MN = start + keys_N[None, :] <= prefix + tokens_M[:, None]
        out_MD, maximum_M, total_M = attend(
            q_MD, keys_ND, values_ND, None, None, is_seen_MN, scale_log2, out_MD, maximum_M, total_M, True, False
        )
    for start in tl.range(0, num_columns, BLOCK_N):
        is_column_N = start + keys_N < num_columns
        columns_N = tl.load(columns + start + keys_N, mask=is_column_N, other=0).to(tl.int64)
        is_column_ND = is_column_N[:, None] & is_dim_D[None, :]
        keys_ND = tl.load(k_D + columns_N[:, None] * k_stride_s, mask=is_column_ND, other=0.0)
        values_ND = tl.load(v_D + columns_N[:, None] * v_stride_s, mask=is_column_ND, other=0.0)
        out_MD, maximum_M, total_M = attend(
            q_MD,
            keys_ND,
            values_ND,
            None,
            None,
            is_column_N[None, :],
            scale_log2,
            out_MD,
            maximum_M,
            total_M,
            True,
            False,
        )

    at_M = tokens_M * num_heads + heads_M
    tl.store(
        out + at_M[:, None] * D + dims_D[None, :],
        (out_MD / total_M[:, None]).to(out.dtype.element_ty),
        mask=is_row_M[:, None] & is_dim_D[None, :],
    )
    tl.store(lse + at_M, (maximum_M + tl.log2(total_M)) * LN_2, mask=is_row_M)


def config(arch: Arch, dtype: torch.dtype, block_d: int, rows: int) -> Config:
    """Rows and keys of a program: as many as a row block has, up to what the compiler fits without spilling.

    A listed block is a multiple of BLOCK_N keys. Columns come BLOCK_N at a time; a list's last group may be shorter.
    """
    if dtype == torch.float32:
        return Config(blocks={"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=2)
    full = arch == 80 and block_d > 64
    block_m = 64 if full or rows < 128 else 128
    return Config(blocks={"BLOCK_M": block_m, "BLOCK_N": 32 if full else 64}, num_warps=block_m // 16, num_stages=2)


@on_its_device
def sparse_prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, index: SparseIndex) -> tuple[Tensor, Tensor]:
    """`sparse_prefill_attention` of checked arguments, in one launch.

    Raises:
        ValueError: the head dim is more than a program holds.
    """
    num_queries, num_heads, head_dim = q_THD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    tiling, num_lists = index.tiling, index.num_lists
    block_d = block_dim(head_dim)
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    out_THD = q_THD.new_empty(q_THD.shape)
    lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    if q_THD.numel() == 0:
        return out_THD, lse_TH
    rows = tiling.row_block * num_heads // num_lists
    chosen = config(arch_of(q_THD), q_THD.dtype, block_d, rows)
    num_programs = tiling.num_row_blocks * num_lists * triton.cdiv(rows, chosen.blocks["BLOCK_M"])
    _sparse_prefill_kernel[(num_programs,)](
        q_THD, k_KSD, v_KSD, out_THD, lse_TH,
        index.block_offsets, index.block_ids, index.column_offsets, index.column_ids,
        num_queries, num_keys, num_heads, num_kv_heads, num_lists, tiling.num_row_blocks, head_dim**-0.5 * LOG2_E,
        q_THD.stride(0), q_THD.stride(1), k_KSD.stride(0), k_KSD.stride(1), v_KSD.stride(0), v_KSD.stride(1),
        ROW_BLOCK=tiling.row_block, KEY_BLOCK=tiling.key_block, D=head_dim, BLOCK_D=block_d,
        **chosen.launch_options(),
    )  # fmt: skip
    return out_THD, lse_TH


LISTS: Final = {"block_offsets": "*i64", "block_ids": "*i32", "column_offsets": "*i64", "column_ids": "*i32"}


def specimens() -> list[Specimen]:
    """Both head dims of the models served, in bf16, with many rows a block and with few."""
    sizes = ("num_queries", "num_keys", "num_heads", "num_kv_heads", "num_lists", "num_row_blocks")
    signature: dict[str, Any] = {
        **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
        "lse": "*fp32",
        **LISTS,
        **dict.fromkeys((*sizes, *STRIDES), "i32"),
        "scale_log2": "fp32",
    }
    return [
        Specimen(
            kernel=_sparse_prefill_kernel,
            name="sparse_prefill_attention",
            arch=arch,
            signature=signature,
            constants={"ROW_BLOCK": row_block, "KEY_BLOCK": 64, "D": head_dim, "BLOCK_D": head_dim},
            config=config(arch, torch.bfloat16, head_dim, row_block),
            aligned=frozenset(STRIDES),
        )
        for arch in ARCHS
        for row_block in (64, 128)
        for head_dim in (64, 128)
    ]
