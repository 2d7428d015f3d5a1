"""Attention of few query tokens a request to its paged context, in Triton; see colm_kernels/decode_attention.py.

Shapes: T query tokens of all requests, R requests, K kv heads, G query heads per kv head, D head dim, B pool pages, P
tokens per page, M page table columns, X rows of a program, N tokens of a block, Z parts of a context.

A row is a query token of a request and one of its kv head's query heads. Contexts are cut into parts, so that a few
long ones fill the processors; a program attends its rows to one part, and a second kernel merges them by their LSE.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from colm_kernels.gpu.device import on_its_device
from colm_kernels.gpu.prefill_attention import block_dim
from colm_kernels.gpu.softmax import LOG2_E, attend
from colm_kernels.gpu.specimen import ARCHS, Arch, Config, Specimen, power_of_two

TARGET_PROGRAMS: Final = 4 * 132
"""Programs that a launch aims at: with few rows, the registers of an H100's 132 multiprocessors hold that many."""
MIN_PART_TOKENS: Final = 512
"""Shortest part of a context. With shorter ones, writing and merging their fp32 outputs costs more than it saves."""


@triton.jit
def _decode_kernel(
    q, k_pages, v_pages, k_scales, v_scales, block_table, context_lens, cu_seqlens_q, out, lse,
    num_tokens, num_kv_heads, group, table_columns, part_tokens, scale_log2,
    PAGE_TOKENS: tl.constexpr, PACKED: tl.constexpr, SCALED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0) // num_kv_heads
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    first_token, num_query_tokens = _query_tokens(cu_seqlens_q, request, PACKED)
    context_len = tl.load(context_lens + request)
    begin = tl.program_id(1) * part_tokens
    if (begin >= context_len) | (tl.program_id(2) * BLOCK_X >= num_query_tokens * group):
        return
    is_row_X, tokens_X, at_X = _rows(first_token, num_query_tokens, num_kv_heads, kv_head, group, BLOCK_X)
    dims_D = tl.arange(0, BLOCK_D)
    is_dim_D = dims_D < D
    q_XD = tl.load(q + at_X[:, None] * D + dims_D[None, :], mask=is_row_X[:, None] & is_dim_D[None, :], other=0.0)
    num_seen_X = context_len - num_query_tokens + 1 + tokens_X

    out_XD = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    maximum_X = tl.full((BLOCK_X,), float("-inf"), tl.float32)
    total_X = tl.zeros((BLOCK_X,), tl.float32)
    keys_N = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, tl.minimum(begin + part_tokens, context_len), BLOCK_N):
        positions_N = start + keys_N
        is_key_N = positions_N < context_len
        page_ids_N = tl.load(
            block_table + request.to(tl.int64) * table_columns + positions_N // PAGE_TOKENS, mask=is_key_N, other=0
        )
        slots_N = page_ids_N.to(tl.int64) * PAGE_TOKENS + positions_N % PAGE_TOKENS
        lines_N = slots_N * num_kv_heads + kv_head
        is_key_ND = is_key_N[:, None] & is_dim_D[None, :]
        keys_ND = tl.load(k_pages + lines_N[:, None] * D + dims_D[None, :], mask=is_key_ND, other=0).to(q_XD.dtype)
        values_ND = tl.load(v_pages + lines_N[:, None] * D + dims_D[None, :], mask=is_key_ND, other=0).to(q_XD.dtype)
        key_scales_N, value_scales_N = None, None
        if SCALED:
            key_scales_N = tl.load(k_scales + lines_N, mask=is_key_N, other=0.0).to(tl.float32)
            value_scales_N = tl.load(v_scales + lines_N, mask=is_key_N, other=0.0).to(tl.float32)
        is_seen_XN = positions_N[None, :] < num_seen_X[:, None]
        out_XD, maximum_X, total_X = attend(
            q_XD, keys_ND, values_ND, key_scales_N, value_scales_N, is_seen_XN, scale_log2,
            out_XD, maximum_X, total_X, True, SCALED,
        )  # fmt: skip

    part_at_X = tl.program_id(1).to(tl.int64) * num_tokens * num_kv_heads * group + at_X
    # Early query tokens may see nothing of the last part, which then weighs exp2(-inf); its output must not be NaN.
    is_nothing_X = (total_X == 0.0) & (tl.num_programs(1) > 1)
    out_XD = out_XD / tl.where(is_nothing_X, 1.0, total_X)[:, None]
    tl.store(
        out + part_at_X[:, None] * D + dims_D[None, :],
        out_XD.to(out.dtype.element_ty),
        mask=is_row_X[:, None] & is_dim_D[None, :],
    )
    tl.store(lse + part_at_X, maximum_X + tl.log2(total_X), mask=is_row_X)


@triton.jit
def _merge_kernel(
    parts, lse, context_lens, cu_seqlens_q, out, num_tokens, num_kv_heads, group, part_tokens,
    PACKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0) // num_kv_heads
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    first_token, num_query_tokens = _query_tokens(cu_seqlens_q, request, PACKED)
    if tl.program_id(2) * BLOCK_X >= num_query_tokens * group:
        return
    is_row_X, _, at_X = _rows(first_token, num_query_tokens, num_kv_heads, kv_head, group, BLOCK_X)
    dims_D = tl.arange(0, BLOCK_D)
    is_out_XD = is_row_X[:, None] & (dims_D < D)[None, :]
    out_XD = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    maximum_X = tl.full((BLOCK_X,), float("-inf"), tl.float32)
    total_X = tl.zeros((BLOCK_X,), tl.float32)
    for part in tl.range(0, tl.cdiv(tl.load(context_lens + request), part_tokens)):
        part_at_X = tl.cast(part, tl.int64) * num_tokens * num_kv_heads * group + at_X
        # The first part holds key 0, which every row sees, so the maximum is finite from then on.
        lse_X = tl.load(lse + part_at_X, mask=is_row_X, other=0.0)
        new_maximum_X = tl.maximum(maximum_X, lse_X, propagate_nan=tl.PropagateNan.ALL)
        decay_X, weight_X = tl.exp2(maximum_X - new_maximum_X), tl.exp2(lse_X - new_maximum_X)
        part_XD = tl.load(parts + part_at_X[:, None] * D + dims_D[None, :], mask=is_out_XD, other=0.0)
        out_XD = out_XD * decay_X[:, None] + part_XD * weight_X[:, None]
        total_X = total_X * decay_X + weight_X
        maximum_X = new_maximum_X
    tl.store(
        out + at_X[:, None] * D + dims_D[None, :], (out_XD / total_X[:, None]).to(out.dtype.element_ty), mask=is_out_XD
    )


@triton.jit
def _query_tokens(cu_seqlens_q, request, PACKED: tl.constexpr):
    if PACKED:
        first_token = tl.load(cu_seqlens_q + request)
        return first_token, tl.load(cu_seqlens_q + request + 1) - first_token
    else:
        return request, 1


@triton.jit
def _rows(first_token, num_query_tokens, num_kv_heads, kv_head, group, BLOCK_X: tl.constexpr):
    rows_X = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    tokens_X = rows_X // group
    lines_X = (first_token + tokens_X).to(tl.int64) * num_kv_heads + kv_head
    return tokens_X < num_query_tokens, tokens_X, lines_X * group + rows_X % group


MERGE: Final = Config(blocks={"BLOCK_X": 16}, num_warps=4, num_stages=1)


def config(dtype: torch.dtype, block_d: int, rows: int) -> Config:
    """Rows of a program, 16 to 64, and tokens of a block: 8 KiB of keys in bf16, for which int8 does not spill either.

    A tensor core takes at least 16 rows. Padding to 16 costs nothing while memory is the bound.
    """
    block_x = min(max(16, power_of_two(rows)), 32 if dtype == torch.float32 else 64)
    block_n = (32 if dtype == torch.float32 else 64) * 64 // max(block_d, 64)
    return Config(blocks={"BLOCK_X": block_x, "BLOCK_N": block_n}, num_warps=4 if block_x < 64 else 8, num_stages=2)


@on_its_device
def decode_attention(
    q_TKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    *,
    cu_seqlens_q_R1: Tensor | None = None,
    k_scales_BPK: Tensor | None = None,
    v_scales_BPK: Tensor | None = None,
) -> Tensor:
    """`decode_attention` of checked arguments, in one launch or two.

    The values of block_table_RM, context_lens_R and cu_seqlens_q_R1 are not checked: reading them on the host would
    wait for the device. Page ids must lie in the pool, and a request must have 1 to `MAX_QUERY_TOKENS` query tokens.

    Raises:
        ValueError: the head dim is more than a program holds.
    """
    num_tokens, num_kv_heads, group, head_dim = q_TKGD.shape
    num_requests, table_columns = block_table_RM.shape
    page_tokens = k_pages_BPKD.shape[1]
    block_d = block_dim(head_dim)
    q_TKGD, block_table_RM = q_TKGD.contiguous(), block_table_RM.contiguous()
    context_lens_R = context_lens_R.contiguous()
    out_TKGD = torch.empty_like(q_TKGD)
    if q_TKGD.numel() == 0:
        return out_TKGD
    # Every request has one query token at least, so none has more than this.
    most_query_tokens = min(num_tokens - num_requests + 1, MAX_QUERY_TOKENS)
    chosen = config(q_TKGD.dtype, block_d, most_query_tokens * group)
    row_tiles = triton.cdiv(most_query_tokens * group, chosen.blocks["BLOCK_X"])
    part_tokens = _part_tokens(table_columns * page_tokens, num_requests * num_kv_heads * row_tiles)
    num_parts = triton.cdiv(table_columns * page_tokens, part_tokens)
    grid = (num_requests * num_kv_heads, num_parts, row_tiles)
    parts = out_TKGD if num_parts == 1 else q_TKGD.new_empty((num_parts, *q_TKGD.shape), dtype=torch.float32)
    lse = q_TKGD.new_empty((num_parts, *q_TKGD.shape[:3]), dtype=torch.float32)
    packed = cu_seqlens_q_R1 is not None
    _decode_kernel[grid](
        q_TKGD, k_pages_BPKD, v_pages_BPKD, k_scales_BPK, v_scales_BPK,
        block_table_RM, context_lens_R, cu_seqlens_q_R1, parts, lse,
        num_tokens, num_kv_heads, group, table_columns, part_tokens, head_dim**-0.5 * LOG2_E,
        PAGE_TOKENS=page_tokens, PACKED=packed, SCALED=k_scales_BPK is not None, D=head_dim, BLOCK_D=block_d,
        **chosen.launch_options(),
    )  # fmt: skip
    if num_parts > 1:
        merge_tiles = triton.cdiv(most_query_tokens * group, MERGE.blocks["BLOCK_X"])
        _merge_kernel[(grid[0], 1, merge_tiles)](
            parts, lse, context_lens_R, cu_seqlens_q_R1, out_TKGD, num_tokens, num_kv_heads, group, part_tokens,
            PACKED=packed, D=head_dim, BLOCK_D=block_d, **MERGE.launch_options(),
        )  # fmt: skip
    return out_TKGD


def _part_tokens(max_context_tokens: int, programs_per_part: int) -> int:
    """Tokens of a part, such that the parts of contexts as long as the table allows make `TARGET_PROGRAMS`."""
    num_parts = -(-TARGET_PROGRAMS // programs_per_part)
    return max(MIN_PART_TOKENS, -(-max_context_tokens // (num_parts * 64)) * 64)


def specimens() -> list[Specimen]:
    """Pages of 16 tokens in bf16 and int8, one query token of few heads and verification of a draft."""
    sizes = ("num_tokens", "num_kv_heads", "group", "table_columns", "part_tokens")
    tables = dict.fromkeys(("block_table", "context_lens", "cu_seqlens_q"), "*i32")

    def attention(arch: Arch, head_dim: int, quantised: bool, rows: int) -> Specimen:
        packed = rows > 16
        signature: Mapping[str, Any] = {
            "q": "*bf16",
            **dict.fromkeys(("k_pages", "v_pages"), "*i8" if quantised else "*bf16"),
            **dict.fromkeys(("k_scales", "v_scales"), "*bf16"),
            **tables,
            **dict.fromkeys(("out", "lse"), "*fp32"),
            **dict.fromkeys(sizes, "i32"),
            "scale_log2": "fp32",
        }
        return Specimen(
            kernel=_decode_kernel,
            name="decode_attention",
            arch=arch,
            signature=signature,
            constants={"PAGE_TOKENS": 16, "PACKED": packed, "SCALED": quantised, "D": head_dim, "BLOCK_D": head_dim},
            config=config(torch.bfloat16, head_dim, rows),
            aligned=frozenset({"part_tokens"}),
            wgmma=rows >= 64,
            loads_elements=quantised,
        )

    def merge(arch: Arch, head_dim: int) -> Specimen:
        return Specimen(
            kernel=_merge_kernel,
            name="decode_attention (merge)",
            arch=arch,
            signature={
                **dict.fromkeys(("parts", "lse"), "*fp32"),
                **tables,
                "out": "*bf16",
                **dict.fromkeys(("num_tokens", "num_kv_heads", "group", "part_tokens"), "i32"),
            },
            constants={"PACKED": True, "D": head_dim, "BLOCK_D": head_dim},
            config=MERGE,
            aligned=frozenset({"part_tokens"}),
            tensor_cores=False,
        )

    return [
        *(
            attention(arch, head_dim, quantised, rows)
            for arch in ARCHS
            for head_dim in (64, 128)
            for quantised in (False, True)
            for rows in (16, 64)
        ),
        *(merge(arch, head_dim) for arch in ARCHS for head_dim in (64, 128)),
    ]
