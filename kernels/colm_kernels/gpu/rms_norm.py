"""RMSNorm (chain) in Triton; see colm_kernels/rms_norm.py.

Shapes: R rows, D features of the active chains, N features of a program's chain.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from colm_kernels.gpu.device import on_its_device
from colm_kernels.gpu.specimen import ARCHS, Arch, Config, Specimen, power_of_two
from colm_kernels.gpu.table import pointer, to_device, word


@triton.jit
def _rms_norm_kernel(
    x, delta, y, chains, num_chains, x_stride, delta_stride, y_stride, eps,
    ADDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // num_chains).to(tl.int64)
    words = chains + tl.program_id(0) % num_chains * 3
    gain, first, dim = pointer(words, 0, x, ALIGNED), word(words, 1, ALIGNED), word(words, 2, ALIGNED)
    columns_N = tl.arange(0, BLOCK_N)
    is_column_N = columns_N < dim
    x_N = x + row * x_stride + first + columns_N
    wide_N = tl.load(x_N, mask=is_column_N, other=0.0).to(tl.float32)
    if ADDED:
        wide_N += tl.load(delta + row * delta_stride + first + columns_N, mask=is_column_N, other=0.0).to(tl.float32)
        sum_N = wide_N.to(x.dtype.element_ty)
        tl.store(x_N, sum_N, mask=is_column_N)
        wide_N = sum_N.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide_N * wide_N) / dim.to(tl.float32) + eps)
    # Rounded before the gain is applied, as in the definition.
    normed_N = (wide_N * scale).to(x.dtype.element_ty).to(tl.float32)
    gain_N = tl.load(gain + columns_N, mask=is_column_N, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + first + columns_N, (normed_N * gain_N).to(y.dtype.element_ty), mask=is_column_N)


def config(max_dim: int) -> Config:
    """A whole chain in one program, 16 features a thread where it is wide: two loads of 16 bytes in bf16."""
    block = max(128, power_of_two(max_dim))
    return Config(blocks={"BLOCK_N": block}, num_warps=min(max(block // 512, 1), 32), num_stages=1)


def rms_norm(x_RD: Tensor, gains: Sequence[Tensor], eps: float) -> Tensor:
    """`rms_norm` of checked arguments, in one launch."""
    return _launch(x_RD if x_RD.stride(1) == 1 else x_RD.contiguous(), None, gains, eps)


def add_rms_norm_(x_RD: Tensor, delta_RD: Tensor, gains: Sequence[Tensor], eps: float) -> Tensor:
    """`add_rms_norm_` of checked arguments, in one launch."""
    if x_RD.stride(1) != 1:
        return rms_norm(x_RD.add_(delta_RD), gains, eps)
    return _launch(x_RD, delta_RD if delta_RD.stride(1) == 1 else delta_RD.contiguous(), gains, eps)


@on_its_device
def _launch(x_RD: Tensor, delta_RD: Tensor | None, gains: Sequence[Tensor], eps: float) -> Tensor:
    y_RD = x_RD.new_empty(x_RD.shape)
    if y_RD.numel() == 0:
        return y_RD
    gains = [gain.contiguous() for gain in gains]
    dims = tuple(len(gain) for gain in gains)
    addresses = tuple(gain.data_ptr() for gain in gains)
    strides = (x_RD.stride(0), 0 if delta_RD is None else delta_RD.stride(0), y_RD.stride(0))
    _rms_norm_kernel[(len(x_RD) * len(gains),)](
        x_RD, delta_RD, y_RD, _chains(x_RD.device, addresses, dims), len(gains), *strides, eps,
        ADDED=delta_RD is not None, ALIGNED=all(word % 16 == 0 for word in (*dims, *addresses, *strides)),
        **config(max(dims)).launch_options(),
    )  # fmt: skip
    return y_RD


@lru_cache(maxsize=4096)
def _chains(device: torch.device, addresses: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    words = [
        (address, sum(dims[:chain]), dim) for chain, (address, dim) in enumerate(zip(addresses, dims, strict=True))
    ]
    return to_device(device, words, 3)


STRIDES: Final = ("x_stride", "delta_stride", "y_stride")


def specimens() -> list[Specimen]:
    """The widths of the 1B and the 8B model, as one chain, with the residual added."""
    signature: dict[str, Any] = {
        **dict.fromkeys(("x", "delta", "y"), "*bf16"),
        "chains": "*i64",
        **dict.fromkeys(("num_chains", *STRIDES), "i32"),
        "eps": "fp32",
    }

    def specimen(arch: Arch, dim: int) -> Specimen:
        return Specimen(
            kernel=_rms_norm_kernel,
            name="add_rms_norm",
            arch=arch,
            signature=signature,
            constants={"ADDED": True, "ALIGNED": True},
            config=config(dim),
            aligned=frozenset(STRIDES),
            tensor_cores=False,
        )

    return [specimen(arch, dim) for arch in ARCHS for dim in (2048, 4096)]
