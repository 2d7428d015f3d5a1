"""SwiGLU's product silu(gate) * up, in place.

Shapes: R rows, F features.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_kernels import native
from colm_kernels.checks import check_dims


class SwigluArgs(ctypes.Structure):
    """`SwigluArgs` of abi.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("gate", "up", "out", "num_rows", "dim", "gate_stride", "up_stride", "out_stride", "dtype")
    )


def swiglu_reference(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """The definition in the tensors' own dtype; see `swiglu_`."""
    return F.silu(gate_RF) * up_RF


def swiglu_(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """Replace gate by silu(gate) * up.

    Args:
        gate_RF: replaced by the result; silu(x) = x / (1 + exp(-x)).
        up_RF: in gate's shape and dtype.

    Returns:
        gate_RF. In fp32 inside and rounded once; error budget in tolerance.py.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate_RF.dim() != 2:
        check_dims("gate_RF", gate_RF, None, None)
    if up_RF.shape != gate_RF.shape or up_RF.dtype != gate_RF.dtype:
        raise ValueError(
            f"up_RF has shape {tuple(up_RF.shape)} and dtype {up_RF.dtype}, "
            f"expected {tuple(gate_RF.shape)} and {gate_RF.dtype} as gate_RF"
        )
    if gate_RF.is_cuda and not native.needs_gradient(gate_RF, up_RF):
        from colm_kernels.gpu import swiglu as on_gpu

        return on_gpu.swiglu_(gate_RF, up_RF)
    variant = native.choose_rows_variant(gate_RF, up_RF)
    if variant == "torch":
        return F.silu(gate_RF, inplace=True).mul_(up_RF)
    num_rows, dim = gate_RF.shape
    gate, stride = gate_RF.data_ptr(), gate_RF.stride(0)
    args = SwigluArgs(
        gate, up_RF.data_ptr(), gate, num_rows, dim, stride, up_RF.stride(0), stride, native.dtype_id(gate_RF.dtype)
    )
    native.call("colm_swiglu", args, variant, torch.get_num_threads())
    return gate_RF
