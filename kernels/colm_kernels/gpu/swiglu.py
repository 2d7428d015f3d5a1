"""SwiGLU's product silu(gate) * up in Triton, in place; see colm_kernels/swiglu.py.

Shapes: R rows, F features, N features of a program.
"""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from colm_kernels.gpu.device import on_its_device
from colm_kernels.gpu.specimen import ARCHS, Config, Specimen


@triton.jit
def _swiglu_kernel(gate, up, dim, gate_stride, up_stride, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column_N = columns_N < dim
    gate_N = tl.load(gate + row * gate_stride + columns_N, mask=is_column_N, other=0.0).to(tl.float32)
    up_N = tl.load(up + row * up_stride + columns_N, mask=is_column_N, other=0.0).to(tl.float32)
    product_N = gate_N / (1.0 + tl.exp(-gate_N)) * up_N
    tl.store(gate + row * gate_stride + columns_N, product_N.to(gate.dtype.element_ty), mask=is_column_N)


CONFIG: Final = Config(blocks={"BLOCK_N": 1024}, num_warps=4, num_stages=1)
"""8 features a thread: one load of 16 bytes in bf16."""


@on_its_device
def swiglu_(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """`swiglu_` of checked arguments, in one launch."""
    if gate_RF.stride(1) != 1:
        return gate_RF.copy_(swiglu_(gate_RF.contiguous(), up_RF))
    if gate_RF.numel() == 0:
        return gate_RF
    up_RF = up_RF if up_RF.stride(1) == 1 else up_RF.contiguous()
    num_rows, dim = gate_RF.shape
    _swiglu_kernel[(num_rows, triton.cdiv(dim, CONFIG.blocks["BLOCK_N"]))](
        gate_RF, up_RF, dim, gate_RF.stride(0), up_RF.stride(0), **CONFIG.launch_options()
    )
    return gate_RF


def specimens() -> list[Specimen]:
    """Any width that is a multiple of 16, in bf16."""
    return [
        Specimen(
            kernel=_swiglu_kernel,
            name="swiglu",
            arch=arch,
            signature={
                **dict.fromkeys(("gate", "up"), "*bf16"),
                **dict.fromkeys(("dim", "gate_stride", "up_stride"), "i32"),
            },
            constants={},
            config=CONFIG,
            aligned=frozenset({"dim", "gate_stride", "up_stride"}),
            tensor_cores=False,
        )
        for arch in ARCHS
    ]
