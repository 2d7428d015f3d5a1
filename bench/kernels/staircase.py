"""Linear (chain) of many rows, as in prefill and training, forward and with its gradients.

Shapes: R rows, D features of all chains.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from colm_kernels import tolerance
from colm_kernels.chain_linear import chain_linear, chain_linear_by_chain
from torch import Tensor
from torch.nn import functional as F

from bench.harness.contest import Contest, timed
from bench.kernels.common import KernelCase, short

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class StaircaseCase(KernelCase):
    """Many rows through the staircase of a square layer."""

    num_rows: int
    dim: int
    chains: tuple[int, ...]
    backward: bool = False
    """The gradients of every weight and of the input are computed too."""

    @property
    def name(self) -> str:
        """The shape in one word."""
        chains = "-".join(map(str, self.chains))
        return f"staircase_{short(self.dtype)}_r{self.num_rows}_d{self.dim}_c{chains}" + "_backward" * self.backward

    @property
    def widths(self) -> list[int]:
        """Features of each chain."""
        return [self.dim * chain // sum(self.chains) for chain in self.chains]

    @property
    def flops(self) -> float:
        """Floating point operations, those with zeros left out."""
        weights = sum(width * reach for width, reach in zip(self.widths, accumulate(self.widths), strict=True))
        return 2.0 * self.num_rows * weights * (3 if self.backward else 1)

    def inputs(self, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """x_RD, one weight a chain, and the gradient of the output."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        weights = [draw(width, reach) for width, reach in zip(self.widths, accumulate(self.widths), strict=True)]
        return draw(self.num_rows, self.dim), weights, draw(self.num_rows, self.dim)

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """The zero-padded Linear; a Linear a chain, joined; and ours. Operations with zeros are not counted.

        With gradients there is also ours over one tensor a chain, as the model trains.
        """
        x, weights, grad = self.inputs(seed)
        full = _zero_padded(weights)
        rows = (self.num_rows,) * len(weights)
        for tensor in (x, full, *weights):
            tensor.requires_grad_(self.backward)

        def ours(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
            return chain_linear(x, weights, None, rows)

        def linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
            return F.linear(x, weights[0])

        def separate(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.linear(x[:, : weight.shape[1]], weight) for weight in weights], dim=1)

        def by_chain(xs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensors:
            ys = chain_linear_by_chain(xs, weights, None)
            return torch.autograd.grad(ys, [*xs, *weights], grads)

        def run(apply: Any, weights: Sequence[Tensor]) -> Tensors:
            if not self.backward:
                with torch.inference_mode():
                    return (apply(x, weights),)
            y = apply(x, weights)
            return y.detach(), *torch.autograd.grad(y, [x, *weights], grad)

        calls = {
            "full": partial(run, linear, [full]),
            "separate": partial(run, separate, weights),
            "ours": partial(run, ours, weights),
        }
        if self.backward:
            xs, grads = ([part.contiguous() for part in tensor.split(self.widths, dim=1)] for tensor in (x, grad))
            calls["by_chain"] = partial(by_chain, [part.detach().requires_grad_() for part in xs], grads)

        def check() -> None:
            expected = [tolerance.linear(x, weights, None, rows)]
            if self.backward:
                expected += tolerance.linear_gradients(x, weights, None, rows, grad)
            tolerance.check_all(expected, calls["ours"]())
            if self.backward:
                gradients = calls["by_chain"]()
                of_xs, of_weights = gradients[: len(weights)], gradients[len(weights) :]
                tolerance.check_all(expected[1:], (torch.cat(of_xs, dim=1), *of_weights))

        yield Contest(
            check=check,
            contenders={name: timed(call, gflops=self.flops / 1e9) for name, call in calls.items()},
            ours="ours",
            against=[name for name in calls if name != "ours"],
            compared_by="gflops_per_s",
        )


STAIRCASE_CASES = tuple(
    StaircaseCase(num_rows=num_rows, dim=dim, chains=chains, backward=backward, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for num_rows, dim, chains, backward in (
        (512, 4096, (8, 8, 8, 8), False),
        (2048, 4096, (8, 8, 8, 8), False),
        (8192, 4096, (8, 8, 8, 8), False),
        (2048, 4096, (16, 16), False),
        (2048, 2048, (8, 8, 8, 8), False),
        (2048, 2048, (16, 16), False),
        (2048, 1024, (8, 8, 8, 8), False),
        (2048, 4096, (8, 8, 8, 8), True),
        (2048, 2048, (8, 8, 8, 8), True),
        (2048, 2048, (16, 16), True),
    )
)
"""Layers of the paper's models, a prefill tile or a training batch at a time."""


def _zero_padded(weights: Sequence[Tensor]) -> Tensor:
    width = weights[-1].shape[1]
    return torch.cat([F.pad(weight, (0, width - weight.shape[1])) for weight in weights])
