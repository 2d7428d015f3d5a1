"""Payloads of the KV stream: laid out for the wire in one pass, and scattered into pages.

Shapes: K kv heads, T tokens of a tile, D head dim.
"""

import ctypes

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.checks import check_dims, check_dtype

_FEWEST_HASHED_BYTES = 241
"""XXH3 hashes shorter inputs in other ways, which the library does not have."""


class PackArgs(ctypes.Structure):
    """`PackArgs` of abi.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("keys", "values", "keys_stride_k", "values_stride_k", "out")),
        *((name, ctypes.c_int64) for name in ("num_heads", "head_bytes", "dtype")),
        ("checksum", ctypes.c_uint64),
        ("is_finite", ctypes.c_int64),
    )


class ScatterArgs(ctypes.Structure):
    """`ScatterArgs` of abi.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("x", "out", "num_heads", "num_tokens", "head_bytes", "x_stride_k", "out_stride")
    )


def pack_payload(k_KTD: Tensor, v_KTD: Tensor, out: Tensor) -> tuple[int, bool] | None:
    """Lay keys and values out as a payload, in the calling thread; other Python threads run meanwhile.

    Args:
        k_KTD: bf16, fp16 or fp32, on the CPU; each head's tokens contiguous, else they are copied first.
        v_KTD: likewise.
        out: uint8, as many as the payload has: all keys, then all values.

    Returns:
        (XXH3-64 of the payload, whether no value is NaN or an infinity); None where the library cannot do it, which has
        written nothing then.

    Raises:
        ValueError: shapes that do not fit together.
    """
    num_heads, num_tokens, head_dim = k_KTD.shape
    check_dims("v_KTD", v_KTD, num_heads, num_tokens, head_dim)
    num_bytes = k_KTD.nbytes + v_KTD.nbytes
    check_dims("out", out, num_bytes)
    variant = native.choose_rows_variant(k_KTD, v_KTD)
    if variant == "torch" or v_KTD.dtype != k_KTD.dtype or num_bytes < _FEWEST_HASHED_BYTES or not out.is_contiguous():
        return None
    if num_tokens > 1 and (k_KTD.stride(1) != head_dim or v_KTD.stride(1) != head_dim):
        k_KTD, v_KTD = k_KTD.contiguous(), v_KTD.contiguous()
    width = k_KTD.element_size()
    args = PackArgs(
        k_KTD.data_ptr(), v_KTD.data_ptr(), k_KTD.stride(0) * width, v_KTD.stride(0) * width, out.data_ptr(),
        num_heads, num_tokens * head_dim * width, native.dtype_id(k_KTD.dtype),
    )  # fmt: skip
    native.call("colm_pack_payload", args, variant, 1)
    return args.checksum, bool(args.is_finite)


def scatter_rows(x_KTD: Tensor, out_TKD: Tensor) -> None:
    """Copy every head's tokens to the rows of a cache: out_TKD[t, k] = x_KTD[k, t].

    On the CPU in the calling thread; other Python threads run meanwhile.

    Args:
        x_KTD: of any dtype.
        out_TKD: rows that follow each other, of the same dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    num_heads, num_tokens, head_dim = x_KTD.shape
    check_dims("out_TKD", out_TKD, num_tokens, num_heads, head_dim)
    check_dtype("out_TKD", out_TKD, x_KTD.dtype)
    if not x_KTD.is_cpu:
        out_TKD.copy_(x_KTD.transpose(0, 1))
        return
    is_dense = x_KTD.stride()[1:] == (head_dim, 1) and out_TKD.stride()[1:] == (head_dim, 1)
    if not is_dense or (variant := native.choose_rows_variant(x_KTD, out_TKD)) == "torch":
        words = _words(x_KTD)
        # NumPy copies in this thread alone.
        out_TKD.view(words).numpy()[...] = x_KTD.view(words).numpy().swapaxes(0, 1)
        return
    width = x_KTD.element_size()
    args = ScatterArgs(
        x_KTD.data_ptr(), out_TKD.data_ptr(), num_heads, num_tokens, head_dim * width, x_KTD.stride(0) * width,
        out_TKD.stride(0) * width,
    )  # fmt: skip
    native.call("colm_scatter_rows", args, variant, 1)


def _words(tensor: Tensor) -> torch.dtype:
    """What NumPy moves in place of bfloat16, which it does not have."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
