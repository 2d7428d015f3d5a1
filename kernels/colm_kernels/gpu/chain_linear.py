"""Linear (chain) in Triton, one launch forward and one for each gradient; see colm_kernels/chain_linear.py.

Shapes: R rows, I input features of the active chains, O output features of the active chains.

The staircase is cut into tiles that lie in one chain each, listed from the longest sum to the shortest: an output tile
sums over the inputs of its own and earlier chains, an input's gradient over the outputs of its own and later chains, a
weight's gradient over the rows that its chain serves. Empty tiles are not listed. Each chain's weights are a tensor,
so lists hold addresses. A list is copied to the device once for each set of weights and chain_rows; packing would copy
the weights themselves, at every step of training.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from colm_kernels.gpu.device import arch_of, on_its_device
from colm_kernels.gpu.specimen import ARCHS, Arch, Config, Specimen, power_of_two
from colm_kernels.gpu.table import pointer, to_device, word

GROUP: Final = tl.constexpr(8)
"""Row tiles that take each column tile in turn together, so that their part of x stays in the second-level cache."""


@triton.jit
def _place(num_rows, num_tiles, BLOCK_R: tl.constexpr):
    group = tl.program_id(0) // (GROUP * num_tiles)
    within = tl.program_id(0) % (GROUP * num_tiles)
    size = tl.minimum(tl.cdiv(num_rows, BLOCK_R) - group * GROUP, GROUP)
    return within // size, (group * GROUP + within % size) * BLOCK_R


@triton.jit
def _forward_kernel(
    x, y, tiles, num_rows, num_tiles, x_stride, y_stride,
    BIASED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    tile, first_row = _place(num_rows, num_tiles, BLOCK_R)
    words = tiles + tile * 7
    weight, bias = pointer(words, 0, x, ALIGNED), pointer(words, 1, x, False)
    weight_stride, num_inputs = word(words, 2, ALIGNED), word(words, 5, ALIGNED).to(tl.int32)
    first_column, num_columns = word(words, 3, ALIGNED), word(words, 4, ALIGNED)
    chain_rows = tl.load(words + 6)
    rows_R = first_row + tl.arange(0, BLOCK_R)
    columns_O = tl.arange(0, BLOCK_O)
    inputs_I = tl.arange(0, BLOCK_I)
    # Indices past the last row or column wrap around to the first ones; their results are not stored.
    x_RI = x + (rows_R % num_rows).to(tl.int64)[:, None] * x_stride + inputs_I[None, :]
    weight_OI = weight + (columns_O % num_columns)[:, None] * weight_stride + inputs_I[None, :]
    y_RO = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for start in tl.range(0, tl.where(first_row < chain_rows, num_inputs, 0), BLOCK_I):
        is_input_I = start + inputs_I < num_inputs
        part_RI = tl.load(x_RI + start, mask=is_input_I[None, :], other=0.0)
        part_OI = tl.load(weight_OI + start, mask=is_input_I[None, :], other=0.0)
        y_RO = tl.dot(part_RI, tl.trans(part_OI), y_RO, input_precision="ieee")
    if BIASED:
        y_RO += tl.load(bias + columns_O, mask=columns_O < num_columns, other=0.0).to(tl.float32)[None, :]
    y_RO = tl.where((rows_R < chain_rows)[:, None], y_RO, 0.0)
    tl.store(
        y + rows_R.to(tl.int64)[:, None] * y_stride + (first_column + columns_O)[None, :],
        y_RO.to(y.dtype.element_ty),
        mask=(rows_R < num_rows)[:, None] & (columns_O < num_columns)[None, :],
    )


@triton.jit
def _input_gradient_kernel(
    grad, grad_x, tiles, chains, num_rows, num_tiles, num_chains, grad_stride, x_stride,
    ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    tile, first_row = _place(num_rows, num_tiles, BLOCK_R)
    words = tiles + tile * 3
    first_input, num_inputs = word(words, 0, ALIGNED), word(words, 1, ALIGNED)
    rows_R = first_row + tl.arange(0, BLOCK_R)
    inputs_I = tl.arange(0, BLOCK_I)
    columns_O = tl.arange(0, BLOCK_O)
    grad_x_RI = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for chain in tl.range(tl.load(words + 2).to(tl.int32), num_chains):
        words_of_chain = chains + chain * 5
        weight, weight_stride = pointer(words_of_chain, 0, grad, ALIGNED), word(words_of_chain, 1, ALIGNED)
        first_column, num_columns = word(words_of_chain, 2, ALIGNED), word(words_of_chain, 3, ALIGNED).to(tl.int32)
        chain_rows = tl.load(words_of_chain + 4)
        grad_RO = grad + rows_R.to(tl.int64)[:, None] * grad_stride + (first_column + columns_O)[None, :]
        weight_OI = weight + columns_O[:, None] * weight_stride + (first_input + inputs_I)[None, :]
        for start in tl.range(0, tl.where(first_row < chain_rows, num_columns, 0), BLOCK_O):
            is_column_O = start + columns_O < num_columns
            part_RO = tl.load(grad_RO + start, mask=(rows_R < chain_rows)[:, None] & is_column_O[None, :], other=0.0)
            part_OI = tl.load(
                weight_OI + tl.cast(start, tl.int64) * weight_stride,
                mask=is_column_O[:, None] & (inputs_I < num_inputs)[None, :],
                other=0.0,
            )
            grad_x_RI = tl.dot(part_RO, part_OI, grad_x_RI, input_precision="ieee")
    tl.store(
        grad_x + rows_R.to(tl.int64)[:, None] * x_stride + (first_input + inputs_I)[None, :],
        grad_x_RI.to(grad_x.dtype.element_ty),
        mask=(rows_R < num_rows)[:, None] & (inputs_I < num_inputs)[None, :],
    )


@triton.jit
def _weight_gradient_kernel(
    grad, x, grad_weights, tiles, grad_stride, x_stride,
    ALIGNED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    words = tiles + tl.program_id(0) * 7
    offset, weight_stride, first_column = word(words, 0, ALIGNED), word(words, 1, ALIGNED), word(words, 2, ALIGNED)
    num_columns, first_input, num_inputs = word(words, 3, ALIGNED), word(words, 4, ALIGNED), word(words, 5, ALIGNED)
    chain_rows = tl.load(words + 6).to(tl.int32)
    columns_O = tl.arange(0, BLOCK_O)
    inputs_I = tl.arange(0, BLOCK_I)
    rows_R = tl.arange(0, BLOCK_R)
    grad_RO = grad + rows_R.to(tl.int64)[:, None] * grad_stride + (first_column + columns_O)[None, :]
    x_RI = x + rows_R.to(tl.int64)[:, None] * x_stride + (first_input + inputs_I)[None, :]
    is_column_O, is_input_I = columns_O < num_columns, inputs_I < num_inputs
    grad_weight_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in tl.range(0, chain_rows, BLOCK_R):
        at = tl.cast(start, tl.int64)
        is_row_R = (start + rows_R < chain_rows)[:, None]
        part_RO = tl.load(grad_RO + at * grad_stride, mask=is_row_R & is_column_O[None, :], other=0.0)
        part_RI = tl.load(x_RI + at * x_stride, mask=is_row_R & is_input_I[None, :], other=0.0)
        grad_weight_OI = tl.dot(tl.trans(part_RO), part_RI, grad_weight_OI, input_precision="ieee")
    tl.store(
        grad_weights + offset + columns_O[:, None] * weight_stride + (first_input + inputs_I)[None, :],
        grad_weight_OI.to(grad_weights.dtype.element_ty),
        mask=is_column_O[:, None] & is_input_I[None, :],
    )


def config(arch: Arch, dtype: torch.dtype, aligned: bool, num_rows: int, *block_names: str) -> Config:
    """Two sides of a tile and the elements summed at a time, in this order under the kernel's block names.

    Tiles are the largest powers of two whose sums leave registers free. 64 elements in bf16 are one cache line. Only a
    tile's first side can consist of rows; few rows take a lower tile.
    """
    if dtype == torch.float32 or not aligned:  # elements that are loaded one by one take registers too
        return Config(blocks=dict(zip(block_names, (64, 64, 32), strict=True)), num_warps=4, num_stages=2)
    first = min(max(16, power_of_two(num_rows)), 128) if block_names[0] == "BLOCK_R" else 128
    second = 256 if arch == 90 and first == 128 else 128
    return Config(
        blocks=dict(zip(block_names, (first, second, 64), strict=True)),
        num_warps=8 if first == 128 else 4,
        num_stages=3,
    )


def chain_linear(
    x_RI: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, chain_rows: Sequence[int]
) -> Tensor:
    """`chain_linear` of checked arguments of one dtype; differentiable once."""
    y_RO: Tensor = _Staircase.apply(x_RI, tuple(chain_rows), *weights, *(biases or ()))
    return y_RO


class _Staircase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, chain_rows: tuple[int, ...], *tensors: Tensor) -> Tensor:
        x_RI, *tensors_read = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x_RI, *tensors))
        weights, biases = tensors_read[: len(chain_rows)], tensors_read[len(chain_rows) :]
        ctx.save_for_backward(x_RI, *weights)
        ctx.chain_rows = chain_rows
        return _forward(x_RI, weights, biases, chain_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, *weights = ctx.saved_tensors
        chain_rows = ctx.chain_rows
        num_chains = len(weights)
        needs_x, _, *needs = ctx.needs_input_grad
        grad_RO = grad_RO if grad_RO.stride(-1) == 1 else grad_RO.contiguous()
        grad_x = _input_gradient(grad_RO, weights, chain_rows, x_RI) if needs_x else None
        grad_weights: list[Tensor | None] = [None] * num_chains
        if any(needs[:num_chains]):
            needed = [chain for chain in range(num_chains) if needs[chain]]
            for chain, grad_weight in zip(
                needed, _weight_gradients(grad_RO, weights, chain_rows, x_RI, needed), strict=True
            ):
                grad_weights[chain] = grad_weight
        parts = grad_RO.split([len(weight) for weight in weights], dim=1)
        grad_biases = [
            part[:rows].sum(dim=0) if need else None
            for part, rows, need in zip(parts, chain_rows, needs[num_chains:], strict=False)
        ]
        return grad_x, None, *grad_weights, *grad_biases


@on_its_device
def _forward(x_RI: Tensor, weights: list[Tensor], biases: list[Tensor], chain_rows: tuple[int, ...]) -> Tensor:
    num_rows = len(x_RI)
    y_RO = x_RI.new_empty(num_rows, sum(len(weight) for weight in weights))
    if y_RO.numel() == 0:
        return y_RO
    aligned = _is_aligned(x_RI, y_RO, weights)
    chosen = config(arch_of(x_RI), x_RI.dtype, aligned, num_rows, "BLOCK_R", "BLOCK_O", "BLOCK_I")
    addresses = tuple(
        (weight.data_ptr(), bias.data_ptr() if biases else 0)
        for weight, bias in zip(weights, biases or weights, strict=True)
    )
    tiles = _output_tiles(x_RI.device, addresses, _shapes(weights), chain_rows, chosen.blocks["BLOCK_O"], x_RI.itemsize)
    _forward_kernel[(triton.cdiv(num_rows, chosen.blocks["BLOCK_R"]) * len(tiles),)](
        x_RI, y_RO, tiles, num_rows, len(tiles), x_RI.stride(0), y_RO.stride(0),
        BIASED=bool(biases), ALIGNED=aligned, **chosen.launch_options(),
    )  # fmt: skip
    return y_RO


@on_its_device
def _input_gradient(grad_RO: Tensor, weights: list[Tensor], chain_rows: tuple[int, ...], x_RI: Tensor) -> Tensor:
    num_rows = len(x_RI)
    grad_x_RI = x_RI.new_empty(x_RI.shape)
    if grad_x_RI.numel() == 0:
        return grad_x_RI
    aligned = _is_aligned(grad_RO, grad_x_RI, weights)
    chosen = config(arch_of(x_RI), x_RI.dtype, aligned, num_rows, "BLOCK_R", "BLOCK_I", "BLOCK_O")
    tiles = _input_tiles(x_RI.device, _shapes(weights), chosen.blocks["BLOCK_I"])
    chains = _chains(x_RI.device, tuple(weight.data_ptr() for weight in weights), _shapes(weights), chain_rows)
    _input_gradient_kernel[(triton.cdiv(num_rows, chosen.blocks["BLOCK_R"]) * len(tiles),)](
        grad_RO, grad_x_RI, tiles, chains, num_rows, len(tiles), len(weights), grad_RO.stride(0), grad_x_RI.stride(0),
        ALIGNED=aligned, **chosen.launch_options(),
    )  # fmt: skip
    return grad_x_RI


@on_its_device
def _weight_gradients(
    grad_RO: Tensor, weights: list[Tensor], chain_rows: tuple[int, ...], x_RI: Tensor, needed: list[int]
) -> list[Tensor]:
    sizes = [weights[chain].numel() for chain in needed]
    # One buffer for all gradients, so that the list of tiles holds no addresses and is the same at every step.
    buffer = x_RI.new_empty(sum(sizes))
    aligned = _is_aligned(grad_RO, x_RI, weights)
    chosen = config(arch_of(x_RI), x_RI.dtype, aligned, len(x_RI), "BLOCK_O", "BLOCK_I", "BLOCK_R")
    tiles = _weight_tiles(
        x_RI.device, _shapes(weights), chain_rows, tuple(needed), chosen.blocks["BLOCK_O"], chosen.blocks["BLOCK_I"]
    )
    if len(tiles):
        _weight_gradient_kernel[(len(tiles),)](
            grad_RO, x_RI, buffer, tiles, grad_RO.stride(0), x_RI.stride(0),
            ALIGNED=aligned, **chosen.launch_options(),
        )  # fmt: skip
    return [part.view_as(weights[chain]) for chain, part in zip(needed, buffer.split(sizes), strict=True)]


Shapes = tuple[tuple[int, int, int], ...]


def _shapes(weights: Sequence[Tensor]) -> Shapes:
    return tuple((*weight.shape, weight.stride(0)) for weight in weights)


def _is_aligned(a: Tensor, b: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether every row and tile starts at a multiple of 16 elements, so that loads are of 16 bytes."""
    words = [a.stride(0), b.stride(0)]
    for weight in weights:
        words += (*weight.shape, weight.stride(0), weight.data_ptr())
    return all(word % 16 == 0 for word in words)


def _first_columns(shapes: Shapes) -> list[int]:
    return [0, *accumulate(shape[0] for shape in shapes)]


@lru_cache(maxsize=4096)
def _output_tiles(
    device: torch.device,
    addresses: tuple[tuple[int, int], ...],
    shapes: Shapes,
    chain_rows: tuple[int, ...],
    block: int,
    item_bytes: int,
) -> Tensor:
    words = []
    for (weight, bias), (out_dim, in_dim, stride), rows, first in zip(
        addresses, shapes, chain_rows, _first_columns(shapes)[:-1], strict=True
    ):
        words += [
            (
                weight + start * stride * item_bytes,
                bias + start * item_bytes,
                stride,
                first + start,
                min(block, out_dim - start),
                in_dim,
                rows,
            )
            for start in range(0, out_dim, block)
        ]
    return to_device(device, words[::-1], 7)


@lru_cache(maxsize=4096)
def _input_tiles(device: torch.device, shapes: Shapes, block: int) -> Tensor:
    bounds = pairwise((0, *(in_dim for _, in_dim, _ in shapes)))
    words = [
        (start, min(block, end - start), chain)
        for chain, (begin, end) in enumerate(bounds)
        for start in range(begin, end, block)
    ]
    return to_device(device, words, 3)


@lru_cache(maxsize=4096)
def _chains(device: torch.device, addresses: tuple[int, ...], shapes: Shapes, chain_rows: tuple[int, ...]) -> Tensor:
    words = [
        (address, stride, first, out_dim, rows)
        for address, (out_dim, _, stride), first, rows in zip(
            addresses, shapes, _first_columns(shapes)[:-1], chain_rows, strict=True
        )
    ]
    return to_device(device, words, 5)


@lru_cache(maxsize=4096)
def _weight_tiles(
    device: torch.device,
    shapes: Shapes,
    chain_rows: tuple[int, ...],
    needed: tuple[int, ...],
    block_o: int,
    block_i: int,
) -> Tensor:
    first_columns = _first_columns(shapes)
    words, offset = [], 0
    for chain in needed:
        out_dim, in_dim, _ = shapes[chain]
        words += [
            (
                offset + column * in_dim,
                in_dim,
                first_columns[chain] + column,
                min(block_o, out_dim - column),
                start,
                min(block_i, in_dim - start),
                chain_rows[chain],
            )
            for column in range(0, out_dim, block_o)
            for start in range(0, in_dim, block_i)
        ]
        offset += out_dim * in_dim
    return to_device(device, words, 7)


def specimens() -> list[Specimen]:
    """All three directions in bf16 with whole tiles, as of every linear layer of the 1B and 8B models, and few rows."""
    stride_names = {"x_stride", "y_stride", "grad_stride"}

    def specimen(arch: Arch, direction: str, num_rows: int) -> Specimen:
        kernel, pointers, sizes, blocks = {
            "forward": (_forward_kernel, ("x", "y"), ("num_rows", "num_tiles"), ("BLOCK_R", "BLOCK_O", "BLOCK_I")),
            "input gradient": (
                _input_gradient_kernel,
                ("grad", "grad_x"),
                ("num_rows", "num_tiles", "num_chains"),
                ("BLOCK_R", "BLOCK_I", "BLOCK_O"),
            ),
            "weight gradient": (
                _weight_gradient_kernel,
                ("grad", "x", "grad_weights"),
                (),
                ("BLOCK_O", "BLOCK_I", "BLOCK_R"),
            ),
        }[direction]
        return Specimen(
            kernel=kernel,
            name=f"chain_linear ({direction})",
            arch=arch,
            signature={
                **dict.fromkeys(pointers, "*bf16"),
                **dict.fromkeys(("tiles", "chains"), "*i64"),
                **dict.fromkeys((*sizes, *stride_names), "i32"),
            },
            constants={"ALIGNED": True, **({"BIASED": False} if direction == "forward" else {})},
            config=config(arch, torch.bfloat16, True, num_rows, *blocks),
            aligned=frozenset(stride_names),
            wgmma=num_rows >= 64,
        )

    return [
        *(
            specimen(arch, direction, 4096)
            for arch in ARCHS
            for direction in ("forward", "input gradient", "weight gradient")
        ),
        *(specimen(arch, "forward", num_rows) for arch in ARCHS for num_rows in (16, 64)),
    ]
