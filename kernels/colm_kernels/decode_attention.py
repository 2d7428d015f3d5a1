"""Attention of one query token a request to its paged context.

Shapes: R requests, K kv heads, G query heads per kv head, D head dim, B pool pages, P tokens per page, M page
table columns, S tokens of one context.
"""

import ctypes

import torch
from torch import Tensor

from colm_kernels.checks import check_dims, check_dtype, check_on_cpu, check_same_dtype
from colm_kernels.native import BadTable, Variant, call, choose_variant, dtype_id, resolve_num_threads


class DecodeArgs(ctypes.Structure):
    """`DecodeArgs` of abi.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_pages", "v_pages", "block_table", "context_lens", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_requests", "num_kv_heads", "group", "head_dim",
                "num_pages", "page_tokens", "table_columns",
            )
        ),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )  # fmt: skip


def decode_attention_reference(
    q_RKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
) -> Tensor:
    """The definition in fp32 (float64 for float64), request by request; see `decode_attention`."""
    page_tokens = k_pages_BPKD.shape[1]
    wide = torch.promote_types(q_RKGD.dtype, torch.float32)
    out_RKGD = torch.empty_like(q_RKGD)
    for request, context_len in enumerate(context_lens_R.tolist()):
        page_ids = block_table_RM[request, : -(-context_len // page_tokens)].long()
        k_SKD = k_pages_BPKD[page_ids].flatten(0, 1)[:context_len].to(wide)
        v_SKD = v_pages_BPKD[page_ids].flatten(0, 1)[:context_len].to(wide)
        scores_KGS = q_RKGD[request].to(wide) @ k_SKD.permute(1, 2, 0) * q_RKGD.shape[-1] ** -0.5
        out_RKGD[request] = (scores_KGS.softmax(dim=-1) @ v_SKD.transpose(0, 1)).to(q_RKGD.dtype)
    return out_RKGD


def decode_attention(
    q_RKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    *,
    num_threads: int | None = None,
) -> Tensor:
    """Attend each request's one query token to its whole cached context.

    Args:
        q_RKGD: one rotated query token a request, its heads grouped by the kv head they read.
        k_pages_BPKD: pool of pages of rotated keys, contiguous.
        v_pages_BPKD: pool of pages of values, same layout.
        block_table_RM: int32 page ids, M >= ceil(context_len / P); entries past the context are ignored.
        context_lens_R: int32 tokens in the cache, the query's own included; >= 1.
        num_threads: PyTorch's own setting where None.

    Returns:
        out_RKGD in q's dtype. Accumulates in fp32; error budget in tolerance.py.

    Raises:
        ValueError: shapes, dtypes, lengths or page ids that do not fit together.

    Example: P=4, context_len=6, table row [7, 2, -1] reads page 7 rows 0-3 and page 2 rows 0-1.
    """
    _check(q_RKGD, k_pages_BPKD, v_pages_BPKD, block_table_RM, context_lens_R)
    threads = resolve_num_threads(num_threads)
    variant = choose_variant(q_RKGD.shape[3], q_RKGD, k_pages_BPKD, v_pages_BPKD)
    if variant == "torch" or q_RKGD.numel() == 0:
        _check_table(k_pages_BPKD, block_table_RM, context_lens_R)
        return _in_torch(q_RKGD, k_pages_BPKD, v_pages_BPKD, block_table_RM, context_lens_R)
    try:
        return _in_library(q_RKGD, k_pages_BPKD, v_pages_BPKD, block_table_RM, context_lens_R, variant, threads)
    except BadTable:
        # The library looks at every entry it uses anyway; here is what it found.
        _check_table(k_pages_BPKD, block_table_RM, context_lens_R)
        raise


def _check(
    q_RKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
) -> None:
    check_dims("q_RKGD", q_RKGD, None, None, None, None)
    num_requests, num_kv_heads, _, head_dim = q_RKGD.shape
    check_dims("k_pages_BPKD", k_pages_BPKD, None, None, num_kv_heads, head_dim)
    num_pages, page_tokens = k_pages_BPKD.shape[:2]
    check_dims("v_pages_BPKD", v_pages_BPKD, num_pages, page_tokens, num_kv_heads, head_dim)
    check_dims("block_table_RM", block_table_RM, num_requests, None)
    check_dims("context_lens_R", context_lens_R, num_requests)
    check_same_dtype(q_RKGD=q_RKGD, k_pages_BPKD=k_pages_BPKD, v_pages_BPKD=v_pages_BPKD)
    check_dtype("q_RKGD", q_RKGD, torch.bfloat16, torch.float32)
    check_on_cpu(
        q_RKGD=q_RKGD,
        k_pages_BPKD=k_pages_BPKD,
        v_pages_BPKD=v_pages_BPKD,
        block_table_RM=block_table_RM,
        context_lens_R=context_lens_R,
    )
    for name, tensor in (("k_pages_BPKD", k_pages_BPKD), ("v_pages_BPKD", v_pages_BPKD)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; pages must be contiguous")
    for name, tensor in (("block_table_RM", block_table_RM), ("context_lens_R", context_lens_R)):
        check_dtype(name, tensor, torch.int32)


def _check_table(k_pages_BPKD: Tensor, block_table_RM: Tensor, context_lens_R: Tensor) -> None:
    num_pages, page_tokens = k_pages_BPKD.shape[:2]
    if context_lens_R.numel() == 0:
        return
    max_tokens = block_table_RM.shape[1] * page_tokens
    shortest, longest = (int(bound) for bound in context_lens_R.aminmax())
    if shortest < 1 or longest > max_tokens:
        raise ValueError(
            f"context_lens_R spans {shortest} to {longest} tokens, outside 1 to {max_tokens}, "
            f"which is what block_table_RM holds"
        )
    num_pages_R = (context_lens_R + (page_tokens - 1)) // page_tokens
    used_RM = torch.arange(block_table_RM.shape[1]) < num_pages_R.unsqueeze(1)
    lowest, highest = (int(bound) for bound in block_table_RM[used_RM].aminmax())
    if lowest < 0 or highest >= num_pages:
        raise ValueError(f"block_table_RM has page ids {lowest} to {highest}, outside 0 to {num_pages - 1}")


def _in_library(
    q_RKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    variant: Variant,
    num_threads: int,
) -> Tensor:
    num_requests, num_kv_heads, group, head_dim = q_RKGD.shape
    # Small tensors: a copy costs nothing beside the pages.
    q_RKGD, block_table_RM = q_RKGD.contiguous(), block_table_RM.contiguous()
    context_lens_R = context_lens_R.contiguous()
    out_RKGD = torch.empty(q_RKGD.shape, dtype=q_RKGD.dtype)
    args = DecodeArgs(
        q=q_RKGD.data_ptr(),
        k_pages=k_pages_BPKD.data_ptr(),
        v_pages=v_pages_BPKD.data_ptr(),
        block_table=block_table_RM.data_ptr(),
        context_lens=context_lens_R.data_ptr(),
        out=out_RKGD.data_ptr(),
        num_requests=num_requests,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        num_pages=k_pages_BPKD.shape[0],
        page_tokens=k_pages_BPKD.shape[1],
        table_columns=block_table_RM.shape[1],
        scale=head_dim**-0.5,
        dtype=dtype_id(q_RKGD.dtype),
    )
    call("colm_decode_attention", args, variant, num_threads)
    return out_RKGD


def _in_torch(
    q_RKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
) -> Tensor:
    """The path without a compiled library: copy each context together, then plain matrix products."""
    page_tokens = k_pages_BPKD.shape[1]
    out_RKGD = torch.empty_like(q_RKGD, memory_format=torch.contiguous_format)
    for request, context_len in enumerate(context_lens_R.tolist()):
        page_ids = block_table_RM[request, : -(-context_len // page_tokens)]
        k_SKD = k_pages_BPKD.index_select(0, page_ids).flatten(0, 1)[:context_len]
        v_SKD = v_pages_BPKD.index_select(0, page_ids).flatten(0, 1)[:context_len]
        q_KGD = q_RKGD[request].float() * q_RKGD.shape[-1] ** -0.5
        weights_KGS = (q_KGD @ k_SKD.float().permute(1, 2, 0)).softmax(dim=-1)
        out_RKGD[request] = (weights_KGS @ v_SKD.float().transpose(0, 1)).to(q_RKGD.dtype)
    return out_RKGD
