"""RMSNorm (chain): normalise each chain of a packed row by its own root mean square and gain, all chains in one call.

Shapes: R rows, D features of the active chains.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.checks import check_dims
from colm_kernels.native import Variant


class NormArgs(ctypes.Structure):
    """`NormArgs` of abi.h, whose chains are an array of (gain, dim) words."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "x", "delta", "y", "chains", "num_chains", "num_rows", "dim", "x_stride", "delta_stride", "y_stride",
            )
        ),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )  # fmt: skip


def rms_norm_reference(x_RD: Tensor, gains: Sequence[Tensor], eps: float) -> Tensor:
    """The definition, in fp32 or wider inside, chain by chain; the PyTorch path too. See `rms_norm`."""
    outputs = []
    for x, gain in zip(x_RD.split([len(gain) for gain in gains], dim=1), gains, strict=True):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        outputs.append((wide * scale).to(x.dtype) * gain)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def rms_norm(x_RD: Tensor, gains: Sequence[Tensor], eps: float) -> Tensor:
    """Normalise each chain: x / sqrt(mean(x^2) + eps), rounded to x's dtype as LLaMA does, times its gain.

    Args:
        x_RD: the chains side by side.
        gains: one (D_i,) a chain, in x's dtype; D_1 + D_2 + .. = D.
        eps: added to the mean square.

    Returns:
        y_RD, contiguous. Each chain of a row has the same bits beside any other rows; error budget in tolerance.py.

    Raises:
        ValueError: shapes or dtypes that do not fit together.

    Example: gains of 9 and 3 features: x[:, :9] is divided by the root mean square of 9 numbers, x[:, 9:] of 3.
    """
    _check(x_RD, gains)
    if x_RD.is_cuda and not native.needs_gradient(x_RD, *gains):
        from colm_kernels.gpu import rms_norm as on_gpu

        return on_gpu.rms_norm(x_RD, gains, eps)
    variant = native.choose_rows_variant(x_RD, *gains)
    if variant == "torch":
        return rms_norm_reference(x_RD, gains, eps)
    return _in_library(x_RD, None, gains, eps, variant)


def add_rms_norm_(x_RD: Tensor, delta_RD: Tensor, gains: Sequence[Tensor], eps: float) -> Tensor:
    """Add delta to the residual stream x in place, and normalise the sum.

    Args:
        x_RD: the chains side by side; holds x + delta, rounded to its dtype, afterwards.
        delta_RD: in x's shape and dtype.
        gains: as in `rms_norm`.
        eps: as in `rms_norm`.

    Returns:
        y_RD: `rms_norm` of the sum, to the bit.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(x_RD, gains)
    if delta_RD.shape != x_RD.shape or delta_RD.dtype != x_RD.dtype:
        raise ValueError(
            f"delta_RD has shape {tuple(delta_RD.shape)} and dtype {delta_RD.dtype}, "
            f"expected {tuple(x_RD.shape)} and {x_RD.dtype} as x_RD"
        )
    if x_RD.is_cuda and not native.needs_gradient(x_RD, delta_RD, *gains):
        from colm_kernels.gpu import rms_norm as on_gpu

        return on_gpu.add_rms_norm_(x_RD, delta_RD, gains, eps)
    variant = native.choose_rows_variant(x_RD, delta_RD, *gains)
    if variant == "torch":
        return rms_norm_reference(x_RD.add_(delta_RD), gains, eps)
    return _in_library(x_RD, delta_RD, gains, eps, variant)


def _check(x_RD: Tensor, gains: Sequence[Tensor]) -> None:
    # Called 61 times a decode step: only plain comparisons when the arguments are right.
    if x_RD.dim() != 2:
        check_dims("x_RD", x_RD, None, None)
    dtype, width = x_RD.dtype, 0
    for chain, gain in enumerate(gains):
        if gain.dim() != 1 or gain.dtype != dtype:
            raise ValueError(f"gains[{chain}] is {gain.dtype} of shape {tuple(gain.shape)}, expected {dtype} of (*)")
        width += gain.shape[0]
    if not gains or width != x_RD.shape[1]:
        raise ValueError(f"x_RD has {x_RD.shape[1]} features, expected the {width} of {len(gains)} gains")


def _in_library(x_RD: Tensor, delta_RD: Tensor | None, gains: Sequence[Tensor], eps: float, variant: Variant) -> Tensor:
    num_rows, dim = x_RD.shape
    dtype = x_RD.dtype
    y_RD = torch.empty((num_rows, dim), dtype=dtype)
    words: list[int] = []
    for gain in gains:
        words += (gain.data_ptr(), gain.shape[0])
    chains = native.words(words)
    args = NormArgs(
        x_RD.data_ptr(),
        0 if delta_RD is None else delta_RD.data_ptr(),
        y_RD.data_ptr(),
        ctypes.addressof(chains),
        len(gains),
        num_rows,
        dim,
        x_RD.stride(0),
        0 if delta_RD is None else delta_RD.stride(0),
        dim,
        eps,
        native.dtype_id(dtype),
    )
    native.call("colm_rms_norm", args, variant, torch.get_num_threads())
    return y_RD
