"""Rotary position embedding in the half-split layout: of queries in place, of keys on their way into the cache.

Shapes: T tokens, N heads, K kv heads, D head dim, S rows of the cache.
"""

import ctypes

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.checks import check_dims, check_dtype, check_slots


class RotaryArgs(ctypes.Structure):
    """`RotaryArgs` of abi.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "x", "out", "v", "v_out", "cos", "sin", "slots", "num_tokens", "num_heads", "head_dim", "num_slots",
            "x_stride_t", "x_stride_n", "out_stride_s", "out_stride_n",
            "v_stride_t", "v_stride_n", "v_out_stride_s", "v_out_stride_n", "cos_stride_t", "sin_stride_t", "dtype",
        )
    )  # fmt: skip


def rotate_reference(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """The definition, in fp32 or wider inside; see `rotate_`."""
    first, second = x_TND.to(torch.promote_types(x_TND.dtype, torch.float32)).chunk(2, dim=-1)
    half = first.shape[-1]
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, :half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TND.dtype)


def rotate_(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate every head in place: plane j, made of features j and j + D/2, by its token's angle j.

    Args:
        x_TND: any strides; D even.
        cos_TD: fp32, both halves of D holding the same angles; the first is read.
        sin_TD: likewise.

    Returns:
        x_TND. In fp32 inside and rounded once; error budget in tolerance.py.

    Raises:
        ValueError: shapes or dtypes that do not fit together.

    Example: D=4, token t at angles (a, b): (x0, x1, x2, x3) becomes (x0 cos a - x2 sin a, x1 cos b - x3 sin b,
    x2 cos a + x0 sin a, x3 cos b + x1 sin b).
    """
    _check_rotation("x_TND", x_TND, cos_TD, sin_TD)
    if x_TND.is_cuda and not native.needs_gradient(x_TND):
        from colm_kernels.gpu import rotary as on_gpu

        return on_gpu.rotate_(x_TND, cos_TD, sin_TD)
    variant = native.choose_rows_variant(x_TND, cos_TD, sin_TD)
    if variant == "torch":
        return x_TND.copy_(rotate_reference(x_TND, cos_TD, sin_TD))
    num_tokens, num_heads, head_dim = x_TND.shape
    x, (stride_t, stride_n, _) = x_TND.data_ptr(), x_TND.stride()
    args = RotaryArgs(
        x, x, 0, 0, cos_TD.data_ptr(), sin_TD.data_ptr(), 0, num_tokens, num_heads, head_dim, num_tokens,
        stride_t, stride_n, stride_t, stride_n, 0, 0, 0, 0, cos_TD.stride(0), sin_TD.stride(0),
        native.dtype_id(x_TND.dtype),
    )  # fmt: skip
    native.call("colm_rotary", args, variant, torch.get_num_threads())
    return x_TND


def write_kv(
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    slot_mapping_T: Tensor | None = None,
) -> None:
    """Write keys, rotated as in `rotate_`, and values, as they are, into the rows of a cache.

    Args:
        k_TKD: unrotated keys.
        v_TKD: values, in k's shape and dtype.
        cos_TD: as in `rotate_`.
        sin_TD: as in `rotate_`.
        k_cache_SKD: keys' cache in k's dtype, any strides: pages of P tokens are `pages_BPKD.flatten(0, 1)`, a
            tile of a kv-head-major cache is `cache_KSD[:, start:stop].transpose(0, 1)`. Must not overlap k or v.
        v_cache_SKD: values' cache, likewise.
        slot_mapping_T: int64 rows, all different: page * P + slot. None where token t goes to row t and S = T.

    Raises:
        ValueError: shapes, dtypes or slots that do not fit together; nothing is written then.

    Example: slot_mapping [35, 2] writes token 0 to page 2, slot 3, of a cache of pages of 16 tokens.
    """
    _check_rotation("k_TKD", k_TKD, cos_TD, sin_TD)
    _check_cache(k_TKD, v_TKD, k_cache_SKD, v_cache_SKD, slot_mapping_T)
    if k_TKD.is_cuda and not native.needs_gradient(k_TKD, v_TKD):
        from colm_kernels.gpu import rotary as on_gpu

        on_gpu.write_kv(k_TKD, v_TKD, cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, slot_mapping_T)
        return
    variant = native.choose_rows_variant(k_TKD, v_TKD, k_cache_SKD, v_cache_SKD, cos_TD, sin_TD)
    if variant == "torch":
        rotated_TKD = rotate_reference(k_TKD, cos_TD, sin_TD)
        if slot_mapping_T is None:
            k_cache_SKD.copy_(rotated_TKD)
            v_cache_SKD.copy_(v_TKD)
        else:
            check_slots(slot_mapping_T, len(k_cache_SKD))
            k_cache_SKD[slot_mapping_T] = rotated_TKD
            v_cache_SKD[slot_mapping_T] = v_TKD
        return
    k_strides, v_strides, k_cache_strides, v_cache_strides = (
        tensor.stride()[:2] for tensor in (k_TKD, v_TKD, k_cache_SKD, v_cache_SKD)
    )
    args = RotaryArgs(
        k_TKD.data_ptr(), k_cache_SKD.data_ptr(), v_TKD.data_ptr(), v_cache_SKD.data_ptr(),
        cos_TD.data_ptr(), sin_TD.data_ptr(), 0 if slot_mapping_T is None else slot_mapping_T.data_ptr(),
        *k_TKD.shape, k_cache_SKD.shape[0],
        *k_strides, *k_cache_strides, *v_strides, *v_cache_strides, cos_TD.stride(0), sin_TD.stride(0),
        native.dtype_id(k_TKD.dtype),
    )  # fmt: skip
    try:
        native.call("colm_rotary", args, variant, torch.get_num_threads())
    except native.BadTable:
        assert slot_mapping_T is not None
        check_slots(slot_mapping_T, len(k_cache_SKD))
        raise


def _check_rotation(name: str, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    # Called 60 times a decode step, like the checks below: only plain comparisons when the arguments are right.
    if x_TND.dim() != 3:
        check_dims(name, x_TND, None, None, None)
    num_tokens, _, head_dim = x_TND.shape
    if head_dim % 2:
        raise ValueError(f"{name} has head dim {head_dim}, expected an even one")
    for angle_name, angle in (("cos_TD", cos_TD), ("sin_TD", sin_TD)):
        if angle.shape != (num_tokens, head_dim):
            check_dims(angle_name, angle, num_tokens, head_dim)
        if angle.dtype != torch.float32:
            check_dtype(angle_name, angle, torch.float32)


def _check_cache(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, slot_mapping_T: Tensor | None
) -> None:
    num_tokens, num_heads, head_dim = k_TKD.shape
    if v_TKD.shape != k_TKD.shape:
        check_dims("v_TKD", v_TKD, num_tokens, num_heads, head_dim)
    num_slots = num_tokens if slot_mapping_T is None else k_cache_SKD.shape[0]
    for name, cache in (("k_cache_SKD", k_cache_SKD), ("v_cache_SKD", v_cache_SKD)):
        if cache.shape != (num_slots, num_heads, head_dim):
            check_dims(name, cache, num_slots, num_heads, head_dim)
    dtype = k_TKD.dtype
    for name, tensor in (("v_TKD", v_TKD), ("k_cache_SKD", k_cache_SKD), ("v_cache_SKD", v_cache_SKD)):
        if tensor.dtype != dtype:
            check_dtype(name, tensor, dtype)
    if slot_mapping_T is not None:
        if slot_mapping_T.shape != (num_tokens,):
            check_dims("slot_mapping_T", slot_mapping_T, num_tokens)
        if slot_mapping_T.dtype != torch.int64 or not slot_mapping_T.is_contiguous():
            raise ValueError(f"slot_mapping_T is {slot_mapping_T.dtype}, expected contiguous int64")
