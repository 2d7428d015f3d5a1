"""Linear (chain) of many rows, with gradients: one product a chain, run by PyTorch's libraries.

The public functions are those of `chain_linear`, which call this file with checked arguments.

Shapes: R rows, I input features of all chains (of chains 1..i in a step), O output features of all (of one) chains.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colm_kernels import native

WIDEN_MIN_ROWS: Final = 256
"""Fewest rows for which bf16 is widened to fp32, on CPUs whose fp32 products are faster.

On two cores of an Intel Xeon (AVX-512, no AMX) that is 1.2x to 1.4x faster at 256 rows and 1.3x to 1.5x at 512. At 128
rows there is no change; below, widening the weights takes longer than it saves.
"""

WIDEN_COLUMNS: Final = 1024
"""Columns of an operand that are widened at a time. Whole 4096x4096 weights, whose copies leave the caches, were 1.2x
slower at 512 rows."""


@cache
def widening_pays() -> bool:
    """Whether fp32 products are faster than bf16 ones: VDPBF16PS is missing or slow, and there is no AMX."""
    return not torch.cpu.get_capabilities().get("amx_bf16") and native.default_variant(torch.bfloat16) in (
        "avx2",
        "avx512",
    )


def many_rows_linear(
    x_RI: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, chain_rows: Sequence[int]
) -> Tensor:
    """`chain_linear` of checked arguments: one product a chain, and one each for its two gradients."""
    y_RO: Tensor = _Staircase.apply(x_RI, chain_rows, *weights, *(biases or ()))
    return y_RO


def step_of_chain(xs: Sequence[Tensor], weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """One chain of `chain_linear_by_chain`."""
    y_RO: Tensor = _Step.apply(weight_OI, bias_O, *xs)
    return y_RO


class _Staircase(torch.autograd.Function):
    """All chains side by side: products write into their columns and gradients add up in place."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, chain_rows: Sequence[int], *tensors: Tensor) -> Tensor:
        num_chains = len(chain_rows)
        weights, biases = tensors[:num_chains], tensors[num_chains:]
        trains_x, _, *trains = ctx.needs_input_grad
        ctx.chain_rows = chain_rows
        ctx.save_for_backward(x_RI if any(trains[:num_chains]) else None, *(weights if trains_x else ()))
        ctx.in_dims = [weight.shape[1] for weight in weights]
        ctx.columns = _side_by_side([weight.shape[0] for weight in weights])
        y_RO = x_RI.new_empty(x_RI.shape[0], sum(weight.shape[0] for weight in weights))
        wide_RI = x_RI.to(_product_dtype(x_RI))
        for chain, (rows, columns, weight) in enumerate(zip(chain_rows, ctx.columns, weights, strict=True)):
            _multiply(
                wide_RI[:rows, : weight.shape[1]],
                weight.T,
                out=y_RO[:rows, columns],
                plus=biases[chain] if biases else None,
            )
            y_RO[rows:, columns] = 0
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, *weights = ctx.saved_tensors
        num_chains = len(ctx.chain_rows)
        trains_x, _, *trains = ctx.needs_input_grad
        wide_RO = grad_RO.to(_product_dtype(grad_RO))
        steps = [wide_RO[:rows, columns] for rows, columns in zip(ctx.chain_rows, ctx.columns, strict=True)]
        grads: list[Tensor | None] = [None] * len(trains)
        for chain, (step, in_dim) in enumerate(zip(steps, ctx.in_dims, strict=True)):
            if trains[chain]:
                grads[chain] = grad_OI = grad_RO.new_empty(step.shape[1], in_dim)
                _multiply(step.T, x_RI[: len(step), :in_dim], out=grad_OI)
        for chain, trained in enumerate(trains[num_chains:]):
            if trained:
                grads[num_chains + chain] = steps[chain].sum(dim=0).to(grad_RO.dtype)
        grad_x_RI = _input_gradient(steps, weights, len(grad_RO)).to(grad_RO.dtype) if trains_x else None
        return grad_x_RI, None, *grads


class _Step(torch.autograd.Function):
    """One chain. It keeps its inputs unjoined and joins them again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bias_O: Tensor | None, *xs: Tensor) -> Tensor:
        trains_weight, _, *trains_xs = ctx.needs_input_grad
        ctx.widths = [x.shape[1] for x in xs]
        ctx.save_for_backward(weight_OI if any(trains_xs) else None, *(xs if trains_weight else ()))
        x_RI = _join(xs)
        y_RO = x_RI.new_empty(len(x_RI), len(weight_OI))
        _multiply(x_RI.to(_product_dtype(x_RI)), weight_OI.T, out=y_RO, plus=bias_O)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, *xs = ctx.saved_tensors
        trains_weight, trains_bias, *trains_xs = ctx.needs_input_grad
        wide_RO = grad_RO.to(_product_dtype(grad_RO))
        grad_weight = grad_bias = None
        if trains_weight:
            grad_weight = grad_RO.new_empty(grad_RO.shape[1], sum(ctx.widths))
            _multiply(wide_RO.T, _join(xs), out=grad_weight)
        if trains_bias:
            grad_bias = grad_RO.sum(dim=0)
        grads_xs: list[Tensor | None] = [None] * len(trains_xs)
        if any(trains_xs):
            first = trains_xs.index(True)
            frozen_width = sum(ctx.widths[:first])
            live_RI = grad_RO.new_empty(len(grad_RO), sum(ctx.widths) - frozen_width)
            _multiply(wide_RO, weight_OI[:, frozen_width:], out=live_RI)
            live = live_RI.split(ctx.widths[first:], dim=1)
            grads_xs[first:] = [grad if needed else None for grad, needed in zip(live, trains_xs[first:], strict=True)]
        return grad_weight, grad_bias, *grads_xs


def _input_gradient(steps: Sequence[Tensor], weights: Sequence[Tensor], num_rows: int) -> Tensor:
    # The last chain reads every input, so its product begins the sum; the others add to their leading columns.
    *earlier, last = zip(steps, weights, strict=True)
    grad_RI = last[0].new_empty(num_rows, last[1].shape[1])
    _multiply(*last, out=grad_RI[: len(last[0])])
    grad_RI[len(last[0]) :] = 0
    for step, weight in reversed(earlier):
        live = grad_RI[: len(step), : weight.shape[1]]
        _multiply(step, weight, out=live, plus=live)
    return grad_RI


def _multiply(a_MK: Tensor, b_KN: Tensor, *, out: Tensor, plus: Tensor | None = None) -> None:
    """Out = a @ b + plus, in a's dtype: b is converted to it, and the result from it, some columns at a time."""
    num_columns = out.shape[1]
    writes = out.dtype == a_MK.dtype
    step = max(num_columns, 1) if writes and b_KN.dtype == a_MK.dtype else WIDEN_COLUMNS
    for start in range(0, num_columns, step):
        columns = slice(start, start + step)
        part, wide = out[:, columns], b_KN[:, columns].to(a_MK.dtype)
        target = part if writes else None
        if plus is None:
            result = torch.mm(a_MK, wide, out=target)
        else:
            result = torch.addmm(plus[..., columns].to(a_MK.dtype), a_MK, wide, out=target)
        if not writes:
            part.copy_(result)


def _product_dtype(rows: Tensor) -> torch.dtype:
    widens = rows.dtype == torch.bfloat16 and len(rows) >= WIDEN_MIN_ROWS and rows.is_cpu and widening_pays()
    return torch.float32 if widens else rows.dtype


def _side_by_side(dims: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(accumulate(dims, initial=0))]


def _join(xs: Sequence[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(list(xs), dim=1)
