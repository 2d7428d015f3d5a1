"""Payloads of the KV stream: laid out for the wire in one pass, and scattered into pages.

Shapes: K kv heads, T tokens of a tile, D head dim.
"""

import ctypes
from collections.abc import Sequence

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


class StoreArgs(ctypes.Structure):
    """`StoreArgs` of abi.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("payload", "k_rows", "v_rows", "runs", "num_runs", "num_heads")),
        *((name, ctypes.c_int64) for name in ("head_bytes", "row_stride", "num_bytes")),
        ("checksum", ctypes.c_uint64),
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


def store_payload(
    payload: Tensor, k_rows_SKD: Tensor, v_rows_SKD: Tensor, runs: Sequence[tuple[int, int]]
) -> int | None:
    """Copy a payload of `pack_payload` to rows of a cache, reading each of its bytes once.

    In the calling thread; other Python threads run meanwhile, and others may write to the payload: the checksum is of
    what was copied.

    Args:
        payload: uint8, at any address: all keys, then all values.
        k_rows_SKD: where keys go; of the payload's dtype.
        v_rows_SKD: where values go.
        runs: (how many tokens, row of the first) in the order of the tokens; rows within the cache.

    Returns:
        XXH3-64 of the payload; None where the library cannot do it, which has written nothing then.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    num_rows, num_heads, head_dim = k_rows_SKD.shape
    check_dims("v_rows_SKD", v_rows_SKD, num_rows, num_heads, head_dim)
    check_dtype("v_rows_SKD", v_rows_SKD, k_rows_SKD.dtype)
    head_bytes = head_dim * k_rows_SKD.element_size()
    check_dims("payload", payload, 2 * num_heads * head_bytes * sum(num_tokens for num_tokens, _ in runs))
    assert all(0 <= row <= num_rows - num_tokens for num_tokens, row in runs)
    row_stride = k_rows_SKD.stride(0)
    variant = native.choose_rows_variant(k_rows_SKD, v_rows_SKD)
    is_dense = k_rows_SKD.stride(1) == v_rows_SKD.stride(1) == head_dim and v_rows_SKD.stride(0) == row_stride
    if variant == "torch" or not is_dense or payload.nbytes < _FEWEST_HASHED_BYTES or not payload.is_contiguous():
        return None
    flat = native.words([number for run in runs for number in run])
    args = StoreArgs(
        payload.data_ptr(), k_rows_SKD.data_ptr(), v_rows_SKD.data_ptr(), ctypes.addressof(flat), len(runs),
        num_heads, head_bytes, row_stride * k_rows_SKD.element_size(), payload.nbytes,
    )  # fmt: skip
    native.call("colm_store_payload", args, variant, 1)
    return int(args.checksum)


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
