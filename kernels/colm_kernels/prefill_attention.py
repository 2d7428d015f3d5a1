"""Dense attention of a tile of queries to all keys up to and including the tile.

Shapes: T queries of the tile, S keys (prefix and tile, S >= T), H query heads, K kv heads, D head dim.
"""

import ctypes
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from colm_kernels.checks import check_dims, check_dtype, check_no_gradient, check_one_device, check_same_dtype
from colm_kernels.native import (
    CancelFlag,
    Variant,
    call,
    choose_variant,
    dtype_id,
    resolve_num_threads,
)

Backend = Literal["auto", "flash_attn", "triton"]
"""What computes dense attention on CUDA; "auto" takes the first of the others that can. The CPU has no choice."""
BACKENDS: Final[tuple[Backend, ...]] = get_args(Backend)


class PrefillArgs(ctypes.Structure):
    """`PrefillArgs` of abi.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_queries", "num_keys", "num_heads", "num_kv_heads", "head_dim",
                "q_stride_t", "q_stride_h", "k_stride_k", "k_stride_s", "v_stride_k", "v_stride_s",
            )
        ),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("flag", ctypes.c_void_p),
        ("rows_per_item", ctypes.c_int64),
        ("item_share", ctypes.c_int64),
    )  # fmt: skip


def prefill_attention_reference(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in fp32 (float64 for float64), with every score held at once; see `prefill_attention`."""
    num_queries, num_heads, head_dim = q_THD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    group = num_heads // num_kv_heads
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    k_HSD = k_KSD.to(wide).repeat_interleave(group, dim=0)
    v_HSD = v_KSD.to(wide).repeat_interleave(group, dim=0)
    scores_HTS = q_THD.to(wide).transpose(0, 1) @ k_HSD.transpose(1, 2) * head_dim**-0.5
    seen_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_THD.device).tril(num_keys - num_queries)
    scores_HTS.masked_fill_(~seen_TS, float("-inf"))
    out_HTD = scores_HTS.softmax(dim=-1) @ v_HSD
    return out_HTD.transpose(0, 1).to(q_THD.dtype), scores_HTS.logsumexp(dim=-1).T


def prefill_attention(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    *,
    num_threads: int | None = None,
    cancelled: CancelFlag | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend a tile of queries to its prefix and, causally, to itself.

    The causal mask is aligned at the bottom right: query t sees keys 0 .. S-T+t.

    Args:
        q_THD: rotated queries, bf16 or fp32, on CUDA fp16 too, any strides; query head h reads kv head h // (H / K).
        k_KSD: rotated keys of the whole prefix and of the tile, kv-head major; any strides with D contiguous.
        v_KSD: values, same layout.
        num_threads: None takes PyTorch's setting; ignored on CUDA.
        cancelled: stops the call between blocks, from another thread; on CUDA only before the launch. Its `done_share`
            follows the library's calls.
        backend: which implementation, on CUDA.

    Returns:
        (out_THD in q's dtype, lse_TH in fp32: the log of each row's softmax denominator). Accumulates in fp32;
        error budget in tolerance.py.

    Raises:
        ValueError: shapes, strides or dtypes that do not fit together, or a backend that cannot take them.
        Cancelled: `cancelled` was set before the end.

    Example: T=2, S=5: query 0 sees keys 0-3, query 1 keys 0-4.
    """
    check_prefill(q_THD, k_KSD, v_KSD)
    if q_THD.is_cuda:
        from colm_kernels.gpu import dense

        check_no_gradient(q_THD=q_THD, k_KSD=k_KSD, v_KSD=v_KSD)
        _stop_if(cancelled)
        return dense.prefill_attention(q_THD, k_KSD, v_KSD, backend)
    check_backend(backend, q_THD.device, q_THD.dtype, q_THD.shape[2])
    threads = resolve_num_threads(num_threads)
    variant = choose_variant(q_THD.shape[2], q_THD, k_KSD, v_KSD)
    if variant == "torch" or q_THD.numel() == 0:
        return _in_torch(q_THD, k_KSD, v_KSD, cancelled)
    return _in_library(q_THD, k_KSD, v_KSD, variant, threads, cancelled)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Refuse a backend that cannot attend on a device.

    Raises:
        ValueError: names the backend, the reason and the way out.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if device.type == "cuda":
        from colm_kernels.gpu import dense

        dense.choose(backend, dtype, head_dim)
    elif backend != "auto":
        raise ValueError(f"backend={backend!r} runs on CUDA alone, and this is {device}; use 'auto'")


def check_prefill(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> None:
    """Refuse what prefill attention, dense or sparse, cannot take.

    Raises:
        ValueError: names the argument.
    """
    check_dims("q_THD", q_THD, None, None, None)
    num_queries, num_heads, head_dim = q_THD.shape
    check_dims("k_KSD", k_KSD, None, None, head_dim)
    num_kv_heads, num_keys, _ = k_KSD.shape
    check_dims("v_KSD", v_KSD, num_kv_heads, num_keys, head_dim)
    check_same_dtype(q_THD=q_THD, k_KSD=k_KSD, v_KSD=v_KSD)
    check_dtype("q_THD", q_THD, torch.bfloat16, torch.float32, *((torch.float16,) if q_THD.is_cuda else ()))
    check_one_device(q_THD=q_THD, k_KSD=k_KSD, v_KSD=v_KSD)
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"q_THD has {num_heads} heads, not a multiple of the {num_kv_heads} kv heads")
    if num_keys < num_queries:
        raise ValueError(f"k_KSD has {num_keys} keys, fewer than the {num_queries} queries of the tile")
    for name, tensor in (("k_KSD", k_KSD), ("v_KSD", v_KSD)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous")


def _in_library(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    variant: Variant,
    num_threads: int,
    cancelled: CancelFlag | None,
) -> tuple[Tensor, Tensor]:
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    out_THD, lse_TH = new_outputs(q_THD)
    args = prefill_args(q_THD, k_KSD, v_KSD, out_THD, lse_TH, cancelled)
    call("colm_prefill_attention", args, variant, num_threads)
    return out_THD, lse_TH


def new_outputs(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out_THD, lse_TH)."""
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


def prefill_args(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, out_THD: Tensor, lse_TH: Tensor, cancelled: CancelFlag | None
) -> PrefillArgs:
    """A call's arguments for the library. Every tensor must have D contiguous and outlive the call."""
    num_queries, num_heads, head_dim = q_THD.shape
    return PrefillArgs(
        q=q_THD.data_ptr(),
        k=k_KSD.data_ptr(),
        v=v_KSD.data_ptr(),
        out=out_THD.data_ptr(),
        lse=lse_TH.data_ptr(),
        num_queries=num_queries,
        num_keys=k_KSD.shape[1],
        num_heads=num_heads,
        num_kv_heads=k_KSD.shape[0],
        head_dim=head_dim,
        q_stride_t=q_THD.stride(0),
        q_stride_h=q_THD.stride(1),
        k_stride_k=k_KSD.stride(0),
        k_stride_s=k_KSD.stride(1),
        v_stride_k=v_KSD.stride(0),
        v_stride_s=v_KSD.stride(1),
        scale=head_dim**-0.5,
        dtype=dtype_id(q_THD.dtype),
        flag=None if cancelled is None else cancelled.address,
    )


def _in_torch(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, cancelled: CancelFlag | None) -> tuple[Tensor, Tensor]:
    if q_THD.numel() == 0:
        return torch.empty_like(q_THD), torch.empty(q_THD.shape[:2])
    q = q_THD.transpose(0, 1).unsqueeze(0)
    k, v = k_KSD.unsqueeze(0), v_KSD.unsqueeze(0)
    num_prefix = k_KSD.shape[1] - q_THD.shape[0]
    # SDPA's causal mask is aligned at the top left, so prefix and tile are two calls, merged by their LSE.
    _stop_if(cancelled)
    out, lse = _flash(q, k[:, :, num_prefix:], v[:, :, num_prefix:], causal=True)
    if num_prefix:
        _stop_if(cancelled)
        prefix_out, prefix_lse = _flash(q, k[:, :, :num_prefix], v[:, :, :num_prefix], causal=False)
        out, lse = _merge(out, lse, prefix_out, prefix_lse)
    _stop_if(cancelled)
    return out[0].transpose(0, 1), lse[0].T


def _stop_if(cancelled: CancelFlag | None) -> None:
    if cancelled is not None:
        cancelled.raise_if_set()


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a = (lse_a - lse).exp().unsqueeze(-1)
    weight_b = (lse_b - lse).exp().unsqueeze(-1)
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse
