"""Attention of a few query tokens a request to its paged context.

Shapes: T query tokens (packed), R requests, R1 = R + 1, N query tokens of one request, K kv heads, G query heads per kv
head, D head dim, B pool pages, P tokens per page, M page table columns, S tokens of one context.
"""

import ctypes
from typing import Final

import torch
from torch import Tensor

from colm_kernels.checks import check_dims, check_dtype, check_no_gradient, check_one_device, check_same_dtype
from colm_kernels.native import BadTable, Variant, call, choose_memory_bound_variant, dtype_id, resolve_num_threads

MAX_QUERY_TOKENS: Final = 16
"""Query tokens that one request may have in one call."""


class DecodeArgs(ctypes.Structure):
    """`DecodeArgs` of abi.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q", "k_pages", "v_pages", "k_scales", "v_scales",
                "block_table", "context_lens", "cu_seqlens_q", "out",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_requests", "num_queries", "num_kv_heads", "group", "head_dim",
                "num_pages", "page_tokens", "table_columns",
            )
        ),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("page_dtype", ctypes.c_int32),
    )  # fmt: skip


def decode_attention_reference(
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
    """The definition in fp32 (float64 for float64), query by query; see `decode_attention`."""
    page_tokens = k_pages_BPKD.shape[1]
    wide = torch.promote_types(q_TKGD.dtype, torch.float32)
    bounds = (_one_query_each(q_TKGD) if cu_seqlens_q_R1 is None else cu_seqlens_q_R1).tolist()
    out_TKGD = torch.empty_like(q_TKGD)
    for request, context_len in enumerate(context_lens_R.tolist()):
        page_ids = block_table_RM[request, : -(-context_len // page_tokens)].long()
        k_SKD, v_SKD = k_pages_BPKD[page_ids].to(wide), v_pages_BPKD[page_ids].to(wide)
        if k_scales_BPK is not None and v_scales_BPK is not None:
            k_SKD = k_SKD * k_scales_BPK[page_ids].to(wide).unsqueeze(-1)
            v_SKD = v_SKD * v_scales_BPK[page_ids].to(wide).unsqueeze(-1)
        k_SKD, v_SKD = k_SKD.flatten(0, 1), v_SKD.flatten(0, 1)
        begin, end = bounds[request : request + 2]
        for query in range(begin, end):
            visible = context_len - (end - 1 - query)
            scores_KGS = q_TKGD[query].to(wide) @ k_SKD[:visible].permute(1, 2, 0) * q_TKGD.shape[-1] ** -0.5
            out_TKGD[query] = (scores_KGS.softmax(dim=-1) @ v_SKD[:visible].transpose(0, 1)).to(q_TKGD.dtype)
    return out_TKGD


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
    num_threads: int | None = None,
) -> Tensor:
    """Attend each request's last few tokens to its whole cached context, causally among themselves.

    Query j of a request's n queries sees the first context_len - n + j + 1 tokens. Its result has the same bits alone,
    beside any other queries of the request, in any batch and with any number of threads, except in PyTorch.

    Args:
        q_TKGD: rotated query tokens, request after request, bf16 or fp32, on CUDA fp16 too; heads grouped by the kv
            head they read.
        k_pages_BPKD: pool of pages of rotated keys in q's dtype or int8, contiguous.
        v_pages_BPKD: pool of pages of values, same layout and dtype.
        block_table_RM: int32 page ids, M >= ceil(context_len / P); entries past the context are ignored.
        context_lens_R: int32 tokens in the cache, the request's query tokens included; >= their number.
        cu_seqlens_q_R1: int32; request r has the query tokens cu_seqlens_q[r] .. cu_seqlens_q[r + 1] - 1, 1 to
            MAX_QUERY_TOKENS of them. One each where None.
        k_scales_BPK: bf16, contiguous; a key is k_pages * k_scales. Given exactly when the pages are int8.
        v_scales_BPK: the same of the values.
        num_threads: None takes PyTorch's setting; ignored on CUDA.

    Returns:
        out_TKGD in q's dtype. Accumulates in fp32; error budget in tolerance.py.

    Raises:
        ValueError: shapes, dtypes, lengths or page ids that do not fit together. On CUDA the values of the table and
            the lengths are not checked, since that would wait for the device.

    Example: P=4, context_len=6, table row [7, 2, -1] reads page 7 rows 0-3 and page 2 rows 0-1. Of two query tokens,
    the first sees five of these rows.
    """
    _check(
        q_TKGD, k_pages_BPKD, v_pages_BPKD, block_table_RM, context_lens_R, cu_seqlens_q_R1, k_scales_BPK, v_scales_BPK
    )
    if q_TKGD.is_cuda:
        from colm_kernels.gpu import decode_attention as on_gpu

        check_no_gradient(q_TKGD=q_TKGD, k_pages_BPKD=k_pages_BPKD, v_pages_BPKD=v_pages_BPKD)
        return on_gpu.decode_attention(
            q_TKGD,
            k_pages_BPKD,
            v_pages_BPKD,
            block_table_RM,
            context_lens_R,
            cu_seqlens_q_R1=cu_seqlens_q_R1,
            k_scales_BPK=k_scales_BPK,
            v_scales_BPK=v_scales_BPK,
        )
    threads = resolve_num_threads(num_threads)
    if cu_seqlens_q_R1 is None:
        cu_seqlens_q_R1 = _one_query_each(q_TKGD)
    arguments = (q_TKGD, k_pages_BPKD, v_pages_BPKD, block_table_RM, context_lens_R, cu_seqlens_q_R1)
    variant = choose_memory_bound_variant(q_TKGD.shape[3], q_TKGD, k_pages_BPKD, v_pages_BPKD)
    if variant == "torch" or q_TKGD.numel() == 0:
        _check_table(q_TKGD, k_pages_BPKD, block_table_RM, context_lens_R, cu_seqlens_q_R1)
        return _in_torch(*arguments, k_scales_BPK, v_scales_BPK)
    try:
        return _in_library(*arguments, k_scales_BPK, v_scales_BPK, variant, threads)
    except BadTable:
        # The library checks every entry that it uses; the slow check here only words the error.
        _check_table(q_TKGD, k_pages_BPKD, block_table_RM, context_lens_R, cu_seqlens_q_R1)
        raise


def _one_query_each(q_TKGD: Tensor) -> Tensor:
    return torch.arange(q_TKGD.shape[0] + 1, dtype=torch.int32)


def _check(
    q_TKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    cu_seqlens_q_R1: Tensor | None,
    k_scales_BPK: Tensor | None,
    v_scales_BPK: Tensor | None,
) -> None:
    check_dims("q_TKGD", q_TKGD, None, None, None, None)
    num_queries, num_kv_heads, _, head_dim = q_TKGD.shape
    check_dims("k_pages_BPKD", k_pages_BPKD, None, None, num_kv_heads, head_dim)
    num_pages, page_tokens = k_pages_BPKD.shape[:2]
    check_dims("v_pages_BPKD", v_pages_BPKD, num_pages, page_tokens, num_kv_heads, head_dim)
    check_dims("context_lens_R", context_lens_R, num_queries if cu_seqlens_q_R1 is None else None)
    num_requests = context_lens_R.shape[0]
    check_dims("block_table_RM", block_table_RM, num_requests, None)
    check_dtype("q_TKGD", q_TKGD, torch.bfloat16, torch.float32, *((torch.float16,) if q_TKGD.is_cuda else ()))
    pages = {"k_pages_BPKD": k_pages_BPKD, "v_pages_BPKD": v_pages_BPKD}
    indices = {"block_table_RM": block_table_RM, "context_lens_R": context_lens_R}
    if cu_seqlens_q_R1 is not None:
        check_dims("cu_seqlens_q_R1", cu_seqlens_q_R1, num_requests + 1)
        indices["cu_seqlens_q_R1"] = cu_seqlens_q_R1
    scales = {}
    for name, tensor in (("k_scales_BPK", k_scales_BPK), ("v_scales_BPK", v_scales_BPK)):
        if (tensor is not None) != (k_pages_BPKD.dtype == torch.int8):
            given = "None" if tensor is None else "given"
            raise ValueError(
                f"{name} is {given} with pages of {k_pages_BPKD.dtype}; int8 pages, and no others, need it"
            )
        if tensor is not None:
            check_dims(name, tensor, num_pages, page_tokens, num_kv_heads)
            check_dtype(name, tensor, torch.bfloat16)
            scales[name] = tensor
    if scales:
        check_same_dtype(**pages)
    else:
        check_same_dtype(q_TKGD=q_TKGD, **pages)
    check_one_device(q_TKGD=q_TKGD, **pages, **indices, **scales)
    for name, tensor in (pages | scales).items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; pages and their scales must be contiguous")
    for name, tensor in indices.items():
        check_dtype(name, tensor, torch.int32)


def _check_table(
    q_TKGD: Tensor, k_pages_BPKD: Tensor, block_table_RM: Tensor, context_lens_R: Tensor, cu_seqlens_q_R1: Tensor
) -> None:
    num_queries, (num_pages, page_tokens) = q_TKGD.shape[0], k_pages_BPKD.shape[:2]
    first, last = int(cu_seqlens_q_R1[0]), int(cu_seqlens_q_R1[-1])
    if first != 0 or last != num_queries:
        raise ValueError(
            f"cu_seqlens_q_R1 runs from {first} to {last}, expected 0 to the {num_queries} tokens of q_TKGD"
        )
    if context_lens_R.numel() == 0:
        return
    num_queries_R = cu_seqlens_q_R1.diff()
    fewest, most = (int(bound) for bound in num_queries_R.aminmax())
    if fewest < 1 or most > MAX_QUERY_TOKENS:
        raise ValueError(
            f"cu_seqlens_q_R1 gives requests {fewest} to {most} query tokens, outside 1 to {MAX_QUERY_TOKENS}"
        )
    max_tokens = block_table_RM.shape[1] * page_tokens
    shortest, longest = (int(bound) for bound in context_lens_R.aminmax())
    if shortest < 1 or longest > max_tokens:
        raise ValueError(
            f"context_lens_R spans {shortest} to {longest} tokens, outside 1 to {max_tokens}, "
            f"which is what block_table_RM holds"
        )
    if bool((context_lens_R < num_queries_R).any()):
        request = int((context_lens_R < num_queries_R).int().argmax())
        raise ValueError(
            f"context_lens_R[{request}]={int(context_lens_R[request])} is below the {int(num_queries_R[request])} "
            f"query tokens of the request, which it must include"
        )
    num_pages_R = (context_lens_R + (page_tokens - 1)) // page_tokens
    used_RM = torch.arange(block_table_RM.shape[1]) < num_pages_R.unsqueeze(1)
    lowest, highest = (int(bound) for bound in block_table_RM[used_RM].aminmax())
    if lowest < 0 or highest >= num_pages:
        raise ValueError(f"block_table_RM has page ids {lowest} to {highest}, outside 0 to {num_pages - 1}")


def _in_library(
    q_TKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    cu_seqlens_q_R1: Tensor,
    k_scales_BPK: Tensor | None,
    v_scales_BPK: Tensor | None,
    variant: Variant,
    num_threads: int,
) -> Tensor:
    # Small tensors: a copy costs nothing beside the pages.
    q_TKGD, block_table_RM = q_TKGD.contiguous(), block_table_RM.contiguous()
    context_lens_R, cu_seqlens_q_R1 = context_lens_R.contiguous(), cu_seqlens_q_R1.contiguous()
    out_TKGD = torch.empty(q_TKGD.shape, dtype=q_TKGD.dtype)
    pages = (k_pages_BPKD, v_pages_BPKD)
    indices = (block_table_RM, context_lens_R, cu_seqlens_q_R1)
    args = library_args(q_TKGD, *pages, *indices, k_scales_BPK, v_scales_BPK, out_TKGD)
    call("colm_decode_attention", args, variant, num_threads)
    return out_TKGD


def library_args(
    q_TKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    cu_seqlens_q_R1: Tensor,
    k_scales_BPK: Tensor | None,
    v_scales_BPK: Tensor | None,
    out_TKGD: Tensor,
) -> DecodeArgs:
    """The library's arguments; tensors as of `decode_attention`, contiguous and unchecked, which must outlive them."""
    num_queries, num_kv_heads, group, head_dim = q_TKGD.shape
    return DecodeArgs(
        q=q_TKGD.data_ptr(),
        k_pages=k_pages_BPKD.data_ptr(),
        v_pages=v_pages_BPKD.data_ptr(),
        k_scales=None if k_scales_BPK is None else k_scales_BPK.data_ptr(),
        v_scales=None if v_scales_BPK is None else v_scales_BPK.data_ptr(),
        block_table=block_table_RM.data_ptr(),
        context_lens=context_lens_R.data_ptr(),
        cu_seqlens_q=cu_seqlens_q_R1.data_ptr(),
        out=out_TKGD.data_ptr(),
        num_requests=context_lens_R.shape[0],
        num_queries=num_queries,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        num_pages=k_pages_BPKD.shape[0],
        page_tokens=k_pages_BPKD.shape[1],
        table_columns=block_table_RM.shape[1],
        scale=head_dim**-0.5,
        dtype=dtype_id(q_TKGD.dtype),
        page_dtype=dtype_id(k_pages_BPKD.dtype),
    )


def _in_torch(
    q_TKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    cu_seqlens_q_R1: Tensor,
    k_scales_BPK: Tensor | None,
    v_scales_BPK: Tensor | None,
) -> Tensor:
    """The path without a compiled library: copy each context together, then plain matrix products."""
    page_tokens = k_pages_BPKD.shape[1]
    bounds = cu_seqlens_q_R1.tolist()

    def gather(pages_BPKD: Tensor, scales_BPK: Tensor | None, page_ids: Tensor) -> Tensor:
        tokens = pages_BPKD.index_select(0, page_ids).float()
        if scales_BPK is not None:
            tokens *= scales_BPK.index_select(0, page_ids).float().unsqueeze(-1)
        return tokens.flatten(0, 1)

    out_TKGD = torch.empty_like(q_TKGD, memory_format=torch.contiguous_format)
    for request, context_len in enumerate(context_lens_R.tolist()):
        page_ids = block_table_RM[request, : -(-context_len // page_tokens)]
        k_SKD = gather(k_pages_BPKD, k_scales_BPK, page_ids)
        v_SKD = gather(v_pages_BPKD, v_scales_BPK, page_ids)
        begin, end = bounds[request : request + 2]
        # Query by query: behind a mask a later token's value that is not finite would still spoil the result.
        for query in range(begin, end):
            visible = context_len - (end - 1 - query)
            q_KGD = q_TKGD[query].float() * q_TKGD.shape[-1] ** -0.5
            weights_KGS = (q_KGD @ k_SKD[:visible].permute(1, 2, 0)).softmax(dim=-1)
            out_TKGD[query] = (weights_KGS @ v_SKD[:visible].transpose(0, 1)).to(q_TKGD.dtype)
    return out_TKGD
