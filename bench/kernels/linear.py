"""Linear (chain) of few rows, as in decode."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from colm_kernels import native, tolerance
from colm_kernels.chain_linear import chain_linear
from colm_kernels.native import use_variant
from torch import Tensor

from bench.kernels.common import SEED, Case, Contenders, checked_contenders, measure_against_reading, short

CACHE_BYTES = 512 << 20
"""More than the caches hold, of a server's CPU too."""


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A few rows through one weight matrix, as in decode."""

    num_rows: int
    in_dim: int
    out_dim: int

    @property
    def name(self) -> str:
        """Shape as a metric's prefix."""
        return f"linear_{short(self.dtype)}_r{self.num_rows}_o{self.out_dim}_i{self.in_dim}"

    @property
    def num_bytes(self) -> int:
        """Weights that one call reads."""
        return self.in_dim * self.out_dim * self.dtype.itemsize

    def inputs(self) -> tuple[Tensor, list[Tensor]]:
        """x_RI and enough equal weights that the caches have forgotten one when its turn comes again."""
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(self.num_rows, self.in_dim, generator=generator).to(self.dtype)
        weight = torch.randn(self.out_dim, self.in_dim, generator=generator).to(self.dtype)
        return x, [weight.clone() for _ in range(-(-CACHE_BYTES // self.num_bytes))]

    def measure(self, num_rounds: int) -> dict[str, Any]:
        """Rates of every contender and of plain reading."""
        variant = native.default_variant(torch.float32)
        return measure_against_reading(linear_contenders(self), self.num_bytes, variant, num_rounds)


LINEAR_CASES = tuple(
    LinearCase(num_rows=num_rows, out_dim=out_dim, in_dim=in_dim, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for out_dim, in_dim in ((1536, 576), (576, 1536), (49152, 576), (4096, 4096))
    for num_rows in (1, 4, 16)
)
"""The feed-forward and the head of a model of 135M parameters, and a layer of one of 7B."""


def linear_contenders(case: LinearCase) -> Contenders:
    """Every variant of this machine and F.linear, going through the weights in turn; refuses to time a wrong kernel."""
    x, weights = case.inputs()
    expected = tolerance.linear(x, weights[:1], None, (case.num_rows,))
    turns = itertools.cycle(weights)

    @torch.inference_mode()
    def run(variant: native.Variant) -> Tensor:
        with use_variant(variant):
            return chain_linear(x, (next(turns),), None, (case.num_rows,))

    return checked_contenders(run, expected, torch.float32)
