"""Linear (chain) of few rows, as in decode: reading the weights bounds it, so each weight is read once for all rows.

The public function is `chain_linear.chain_linear`, which calls this file where that is faster.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from colm_kernels import native, panels
from colm_kernels.native import Variant
from colm_kernels.staircase import Weights, all_in_panels, format_of, memory_of

MAX_ROWS: Final = 16
"""Most rows for which the library is used.

On one core of an Intel Xeon (AVX-512, no AMX) it beats F.linear in bf16 1.5x at 1 to 16 rows and 1.4x still at 32. In
fp32 there is no change at 1 row, 1.6x to 1.9x at 8, 1.0x to 1.4x at 16 and no change at 24. bf16 stops at 16: there
products already take longer than reading, and PyTorch uses AMX for them where the CPU has it, the library does not.
"""

MAX_ROWS_OF_PAIRS: Final = 64
"""The same where the library multiplies pairs of bf16.

On one core of an AMD Zen 4 it beats F.linear 2x to 3x at 1 to 16 rows, 1.2x at 32, and 1.0x to 1.1x at 64.
"""


LINEAR_BLOCK_WORDS: Final = 7
"""64-bit words of a `LinearBlock` of abi.h: weight, bias, num_rows, in_dim, out_dim, format, and room for
first_column."""


class LinearArgs(ctypes.Structure):
    """`LinearArgs` of abi.h, whose blocks are an array of `LINEAR_BLOCK_WORDS` words each."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "x", "y", "blocks", "num_blocks", "num_rows", "in_dim", "x_stride", "y_stride", "dtype", "words",
        )
    )  # fmt: skip


def variant_for(x_RI: Tensor, weights: Weights, biases: Sequence[Tensor] | None) -> Variant:
    """The variant that runs these tensors; "torch" where the library cannot or is not faster."""
    dtype = x_RI.dtype
    of_panels = all_in_panels(weights)
    variant = library_variant(x_RI.shape[0], dtype, in_panels=of_panels)
    if variant == "torch" or x_RI.stride(1) != 1 or not x_RI.is_cpu:
        return "torch"
    for weight in weights:
        if weight.dtype != dtype:
            return "torch"
    tensors = [memory_of(weight) for weight in weights]
    for bias in biases or ():
        if bias.dtype != dtype:
            return "torch"
        tensors.append(bias)
    for tensor in tensors:
        if not tensor.is_contiguous() or not tensor.is_cpu:
            return "torch"
    if native.needs_gradient(x_RI, *tensors):
        return "torch"
    return variant


def library_variant(num_rows: int, dtype: torch.dtype, *, in_panels: bool = False) -> Variant:
    """The variant that runs so many rows of a dtype; "torch" where the library cannot or is not faster."""
    if in_panels:
        return panels.library_variant(dtype)
    if not 0 < num_rows <= MAX_ROWS_OF_PAIRS or dtype not in (torch.bfloat16, torch.float32):
        return "torch"
    variant = native.forced_variant() or native.default_variant(dtype)
    is_in_pairs = variant == "avx512_bf16" and dtype == torch.bfloat16
    return variant if num_rows <= MAX_ROWS or is_in_pairs else "torch"


def few_rows_linear(
    x_RI: Tensor,
    weights: Weights,
    biases: Sequence[Tensor] | None,
    chain_rows: Sequence[int],
    variant: Variant,
) -> Tensor:
    """`chain_linear` of checked arguments, in one call of the library; other Python threads run meanwhile.

    Weights in panels take any number of rows.

    A row's result depends neither on the other rows nor on the other chains: it is bit-identical in any batch and at
    any scale. Sums run in fp32; the error budget is in tolerance.py. Where pairs of bf16 are multiplied, numbers below
    the smallest normal one count as zero.
    """
    num_rows, in_dim = x_RI.shape
    words: list[int] = []
    out_dim = 0
    for chain, (weight, rows) in enumerate(zip(weights, chain_rows, strict=True)):
        chain_out, chain_in = weight.shape
        bias = 0 if biases is None else biases[chain].data_ptr()
        words += (weight.data_ptr(), bias, rows, chain_in, chain_out, format_of(weight), 0)
        out_dim += chain_out
    blocks = native.words(words)
    dtype = x_RI.dtype
    y_RO = torch.empty((num_rows, out_dim), dtype=dtype)
    args = LinearArgs(
        x_RI.data_ptr(),
        y_RO.data_ptr(),
        ctypes.addressof(blocks),
        len(words) // LINEAR_BLOCK_WORDS,
        num_rows,
        in_dim,
        x_RI.stride(0),
        out_dim,
        native.dtype_id(dtype),
    )
    native.call("colm_linear", args, variant, torch.get_num_threads())
    return y_RO
