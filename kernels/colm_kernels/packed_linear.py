"""Linear (chain) of many rows, without gradients, in the library: bf16 where PyTorch's products are not faster.

The public functions are those of `chain_linear`, which call this file where that is faster.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Final

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.staircase import Staircase, Weights

INPUT_MULTIPLE: Final = 32
"""Inputs of every chain are a multiple of it: what a vector of bf16 holds."""

BLOCK_WORDS: Final = 9
"""64-bit words of a `PackedBlock` of abi.h."""


class PackedArgs(ctypes.Structure):
    """`PackedArgs` of abi.h, whose blocks are an array of `BLOCK_WORDS` words each."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("x", "blocks", "num_blocks", "num_rows", "x_stride", "dtype"))


def takes(x_RI: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether the library can run these tensors, and is no slower than PyTorch.

    On one core of an AMD Zen 4 it takes as long at 4 to 17 rows, and beats F.linear 1.06x to 1.15x at 24 rows and 1.02x
    to 1.09x at 512 and 1024. On one of a Zen 3, which has no bf16 unit, it is 3x to 4.7x as fast at 17 to 64 rows,
    0.93x to 1.36x at 256 and 1.04x to 1.16x at 512. Its fp32 there is 0.81x to 0.96x as fast from 256 rows on.
    """
    if x_RI.dtype != torch.bfloat16 or not x_RI.is_cpu or _variant(native.forced_variant()) is None:
        return False
    if x_RI.stride(1) != 1 or x_RI.stride(0) % 2 or x_RI.data_ptr() % 4:
        return False
    for tensor in (*weights, *biases):
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous() or not tensor.is_cpu:
            return False
    if any(weight.shape[1] % INPUT_MULTIPLE for weight in weights):
        return False
    return not native.needs_gradient(x_RI, *weights, *biases)


@cache
def _variant(forced: native.Variant | None) -> native.Variant | None:
    """The variant that runs bf16; None where PyTorch is faster: it uses AMX, and fp32 where VDPBF16PS is slow."""
    if forced is None and torch.cpu.get_capabilities().get("amx_bf16", False):
        return None
    variant = forced or native.default_variant(torch.bfloat16)
    return variant if variant in ("avx2", "avx512_bf16") else None


def packed_linear(x_RI: Tensor, staircases: Sequence[Staircase]) -> list[Tensor]:
    """`joint_linear` of checked arguments that `takes` admits, in one call; other Python threads run meanwhile."""
    words: list[int] = []
    outputs = []
    for weights, biases, chain_rows in staircases:
        y_RO = _new_output(x_RI, weights)
        outputs.append(y_RO)
        place, stride = y_RO.data_ptr(), y_RO.stride(0)
        for chain, (weight, rows) in enumerate(zip(weights, chain_rows, strict=True)):
            out_dim, in_dim = weight.shape
            bias = 0 if biases is None else biases[chain].data_ptr()
            words += (weight.data_ptr(), 0, bias, 0, place, stride, rows, in_dim, out_dim)
            place += out_dim * x_RI.element_size()
    _call(x_RI, words)
    return outputs


def packed_swiglu(x_RI: Tensor, gate: Staircase, up: Staircase) -> Tensor:
    """silu(gate(x)) * up(x) of two staircases of the same shape, rounded once."""
    (gates, gate_biases, chain_rows), (ups, up_biases, _) = gate, up
    y_RO = _new_output(x_RI, ups)
    words: list[int] = []
    place, stride = y_RO.data_ptr(), y_RO.stride(0)
    for chain, rows in enumerate(chain_rows):
        out_dim, in_dim = ups[chain].shape
        biases = (each[chain].data_ptr() if each is not None else 0 for each in (up_biases, gate_biases))
        words += (ups[chain].data_ptr(), gates[chain].data_ptr(), *biases, place, stride, rows, in_dim, out_dim)
        place += out_dim * x_RI.element_size()
    _call(x_RI, words)
    return y_RO


def _new_output(x_RI: Tensor, weights: Weights) -> Tensor:
    return x_RI.new_empty(len(x_RI), sum(weight.shape[0] for weight in weights))


def _call(x_RI: Tensor, words: list[int]) -> None:
    blocks = native.words(words)
    args = PackedArgs(
        x_RI.data_ptr(),
        ctypes.addressof(blocks),
        len(words) // BLOCK_WORDS,
        len(x_RI),
        x_RI.stride(0),
        native.dtype_id(x_RI.dtype),
    )
    variant = _variant(native.forced_variant())
    assert variant is not None, "takes admits only what the library has"
    native.call("colm_packed_linear", args, variant, torch.get_num_threads())
