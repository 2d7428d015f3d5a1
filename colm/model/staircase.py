"""Linear (chain) over one tensor a chain, with gradients that end where training ends.

Shapes: R rows, I features of all input chains, O output features of one chain.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def staircase(xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> list[Tensor]:
    """y_i = W_i [x_1 .. x_i] + b_i, for as many chains as there are inputs.

    One product a chain, and in the backward pass one each for its weight and its inputs: a staircase of n steps
    cannot be cut into fewer than n rectangles without multiplying zeros. What does not require a gradient (a
    frozen chain's weight, or its features) is left out of those products, not computed and thrown away.

    Chain i is computed from the same contiguous operands however many chains follow, so a scale has the same bits
    alone and inside the whole.

    Args:
        xs: the input chains, (R, I_i) each.
        weights: (O_i, I_1 + .. + I_i), one a chain.
        biases: (O_i,), one a chain, or None.

    Returns:
        One (R, O_i) a chain; those that depend on nothing trainable carry no graph.
    """
    return [
        _Step.apply(weights[chain], None if biases is None else biases[chain], *xs[: chain + 1])
        for chain in range(len(xs))
    ]


class _Step(torch.autograd.Function):
    """One chain. Its inputs are kept as they are and joined again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bias_O: Tensor | None, *xs: Tensor) -> Tensor:
        trains_weight, _, *trains_xs = ctx.needs_input_grad
        ctx.widths = [x.shape[1] for x in xs]
        ctx.save_for_backward(weight_OI if any(trains_xs) else None, *(xs if trains_weight else ()))
        return F.linear(_join(xs), weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, *xs = ctx.saved_tensors
        trains_weight, trains_bias, *trains_xs = ctx.needs_input_grad
        grad_weight = grad_RO.T @ _join(xs) if trains_weight else None
        grad_bias = grad_RO.sum(dim=0) if trains_bias else None
        grads_xs: list[Tensor | None] = [None] * len(trains_xs)
        if any(trains_xs):
            first = trains_xs.index(True)
            live = (grad_RO @ weight_OI[:, sum(ctx.widths[:first]) :]).split(ctx.widths[first:], dim=1)
            grads_xs[first:] = [grad if needed else None for grad, needed in zip(live, trains_xs[first:], strict=True)]
        return grad_weight, grad_bias, *grads_xs


def _join(xs: Sequence[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(list(xs), dim=1)
