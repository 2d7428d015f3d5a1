"""Symmetric int8 keys or values with one bf16 scale a token and kv head: about half of bf16's bytes.

Shapes: T tokens, K kv heads, D head dim, S rows of the cache.
"""

import ctypes

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.checks import check_dims, check_dtype, check_slots

LARGEST = 127
"""Largest magnitude of a quantised element; -128 is never used."""


class QuantiseArgs(ctypes.Structure):
    """`QuantiseArgs` of abi.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "x", "q", "scale", "slots", "num_tokens", "num_heads", "head_dim", "num_slots", "x_stride_t", "x_stride_k",
            "q_stride_s", "q_stride_k", "scale_stride_s", "scale_stride_k", "dtype",
        )
    )  # fmt: skip


class DequantiseArgs(ctypes.Structure):
    """`DequantiseArgs` of abi.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "q", "scale", "out", "num_tokens", "num_heads", "head_dim", "q_stride_t", "q_stride_k", "scale_stride_t",
            "scale_stride_k", "out_stride_t", "out_stride_k", "dtype",
        )
    )  # fmt: skip


def quantise_kv_reference(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, to the bit; see `quantise_kv`."""
    wide_TKD = x_TKD.float()
    amax_TK = wide_TKD.abs().amax(dim=-1)
    # Rounded up to bf16: 0xffff carries into the upper half wherever the lower is not zero.
    up_TK = ((amax_TK / LARGEST).view(torch.int32) + 0xFFFF >> 16).to(torch.int16).view(torch.bfloat16)
    scale_TK = torch.where(amax_TK.isfinite(), up_TK, float("nan"))
    q_TKD = (wide_TKD / scale_TK.float().unsqueeze(-1)).round()
    return q_TKD.where(scale_TK.unsqueeze(-1) > 0, 0).to(torch.int8), scale_TK


def quantise_kv(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of a token and head by its own scale.

    scale = max|x| / 127 rounded up to bf16, q = x / scale rounded half to even, so -127 <= q <= 127. Where the scale
    is 0, as for a row of zeros, q is 0. Rows with NaN or infinity get the scale NaN and q 0, so they dequantise to NaN.

    Args:
        x_TKD: bf16, fp32 or fp16.

    Returns:
        (q_TKD in int8, scale_TK in bf16), contiguous; the same bits from every variant.

    Raises:
        ValueError: a shape or dtype that does not fit.

    Example: the row (0, 127, -2.5) has scale 1 and becomes (0, 127, -2).
    """
    q_TKD = torch.empty(x_TKD.shape, dtype=torch.int8, device=x_TKD.device)
    scale_TK = torch.empty(x_TKD.shape[:2], dtype=torch.bfloat16, device=x_TKD.device)
    write_quantised_kv(x_TKD, q_TKD, scale_TK)
    return q_TKD, scale_TK


def write_quantised_kv(
    x_TKD: Tensor,
    q_cache_SKD: Tensor,
    scale_cache_SK: Tensor,
    slot_mapping_T: Tensor | None = None,
    *,
    num_threads: int | None = None,
) -> None:
    """`quantise_kv` into the rows of a cache.

    Args:
        x_TKD: bf16, fp32 or fp16.
        q_cache_SKD: int8, any strides: pages or a slice, as in `rotary.write_kv`.
        scale_cache_SK: bf16, any strides.
        slot_mapping_T: int64 rows, all different: page * P + slot. None where token t goes to row t and S = T.
        num_threads: None takes PyTorch's setting; ignored on CUDA.

    Raises:
        ValueError: shapes, dtypes or slots that do not fit together; nothing is written then.
    """
    _check(x_TKD, q_cache_SKD, scale_cache_SK, slot_mapping_T)
    if x_TKD.dtype == torch.float16:
        x_TKD = x_TKD.float()  # exact; neither the library nor Triton's kernel reads fp16
    if x_TKD.is_cuda:
        from colm_kernels.gpu import kv_quantise as on_gpu

        on_gpu.write_quantised_kv(x_TKD, q_cache_SKD, scale_cache_SK, slot_mapping_T)
        return
    variant = native.choose_rows_variant(x_TKD)
    if variant == "torch" or q_cache_SKD.stride(2) != 1 or not q_cache_SKD.is_cpu:
        q_TKD, scale_TK = quantise_kv_reference(x_TKD)
        if slot_mapping_T is None:
            q_cache_SKD.copy_(q_TKD)
            scale_cache_SK.copy_(scale_TK)
        else:
            check_slots(slot_mapping_T, len(q_cache_SKD))
            q_cache_SKD[slot_mapping_T] = q_TKD
            scale_cache_SK[slot_mapping_T] = scale_TK
        return
    args = QuantiseArgs(
        x_TKD.data_ptr(), q_cache_SKD.data_ptr(), scale_cache_SK.data_ptr(),
        0 if slot_mapping_T is None else slot_mapping_T.data_ptr(),
        *x_TKD.shape, q_cache_SKD.shape[0],
        *x_TKD.stride()[:2], *q_cache_SKD.stride()[:2], *scale_cache_SK.stride(), native.dtype_id(x_TKD.dtype),
    )  # fmt: skip
    try:
        native.call("colm_quantise", args, variant, native.resolve_num_threads(num_threads))
    except native.BadTable:
        assert slot_mapping_T is not None
        check_slots(slot_mapping_T, len(q_cache_SKD))
        raise


def dequantise_kv(q_TKD: Tensor, scale_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """x_TKD = q * scale, the definition to the bit: a product that fp32 holds exactly, rounded once to dtype.

    The error is at most half a scale plus that rounding.
    """
    return (q_TKD.float() * scale_TK.float().unsqueeze(-1)).to(dtype)


def write_dequantised_kv(q_TKD: Tensor, scale_TK: Tensor, out_TKD: Tensor, *, num_threads: int | None = None) -> None:
    """`dequantise_kv` into rows of a cache, in one pass.

    Args:
        q_TKD: int8, any strides; in host memory also where the cache lies on a device.
        scale_TK: bf16, any strides, beside q_TKD; both may lie at any address, as in a message.
        out_TKD: bf16, fp32 or fp16, any strides.
        num_threads: None takes PyTorch's setting.

    Raises:
        ValueError: shapes or dtypes that do not fit together; nothing is written then.
    """
    check_dims("q_TKD", q_TKD, None, None, None)
    _check_pair("q_TKD", q_TKD, "scale_TK", scale_TK)
    check_dims("out_TKD", out_TKD, *q_TKD.shape)
    check_dtype("out_TKD", out_TKD, torch.bfloat16, torch.float32, torch.float16)
    threads, variant = native.resolve_num_threads(num_threads), native.choose_rows_variant(out_TKD)
    if variant == "torch" or q_TKD.stride(2) != 1:
        on_device = q_TKD.to(out_TKD.device), scale_TK.to(out_TKD.device)
        out_TKD.copy_(dequantise_kv(*on_device, out_TKD.dtype))
        return
    args = DequantiseArgs(
        q_TKD.data_ptr(), scale_TK.data_ptr(), out_TKD.data_ptr(), *q_TKD.shape,
        *q_TKD.stride()[:2], *scale_TK.stride(), *out_TKD.stride()[:2], native.dtype_id(out_TKD.dtype),
    )  # fmt: skip
    native.call("colm_dequantise", args, variant, threads)


def _check(x_TKD: Tensor, q_cache_SKD: Tensor, scale_cache_SK: Tensor, slot_mapping_T: Tensor | None) -> None:
    check_dims("x_TKD", x_TKD, None, None, None)
    check_dtype("x_TKD", x_TKD, torch.bfloat16, torch.float32, torch.float16)
    num_tokens, num_heads, head_dim = x_TKD.shape
    if head_dim == 0:
        raise ValueError("x_TKD has head dim 0, expected at least 1")
    num_slots = num_tokens if slot_mapping_T is None else q_cache_SKD.shape[0]
    check_dims("q_cache_SKD", q_cache_SKD, num_slots, num_heads, head_dim)
    _check_pair("q_cache_SKD", q_cache_SKD, "scale_cache_SK", scale_cache_SK)
    if slot_mapping_T is not None:
        check_dims("slot_mapping_T", slot_mapping_T, num_tokens)
        if slot_mapping_T.dtype != torch.int64 or not slot_mapping_T.is_contiguous():
            raise ValueError(f"slot_mapping_T is {slot_mapping_T.dtype}, expected contiguous int64")


def _check_pair(q_name: str, q: Tensor, scale_name: str, scale: Tensor) -> None:
    check_dims(scale_name, scale, *q.shape[:2])
    check_dtype(q_name, q, torch.int8)
    check_dtype(scale_name, scale, torch.bfloat16)
