"""Linear (chain) of few rows, as in decode."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from colm_kernels import native, tolerance
from colm_kernels.chain_linear import chain_linear
from colm_kernels.native import use_variant
from torch import Tensor

from bench.harness.contest import Contest
from bench.kernels.common import KernelCase, against_reading, short

CACHE_BYTES = 512 << 20
"""More bytes than the caches hold, even those of a server's CPU."""


@dataclass(frozen=True, kw_only=True)
class LinearCase(KernelCase):
    """A few rows through one weight matrix, as in decode."""

    num_rows: int
    in_dim: int
    out_dim: int

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"linear_{short(self.dtype)}_r{self.num_rows}_o{self.out_dim}_i{self.in_dim}"

    @property
    def num_bytes(self) -> int:
        """Weights that one call reads."""
        return self.in_dim * self.out_dim * self.dtype.itemsize

    def inputs(self, seed: int) -> tuple[Tensor, list[Tensor]]:
        """x_RI and equal weights, so many that the caches no longer hold a weight when its turn comes again."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.num_rows, self.in_dim, generator=generator).to(self.dtype)
        weight = torch.randn(self.out_dim, self.in_dim, generator=generator).to(self.dtype)
        return x, [weight.clone() for _ in range(-(-CACHE_BYTES // self.num_bytes))]

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Every variant of this machine, F.linear and plain reading, going through the weights in turn."""
        x, weights = self.inputs(seed)
        expected = tolerance.linear(x, weights[:1], None, (self.num_rows,))
        turns = itertools.cycle(weights)

        @torch.inference_mode()
        def run(variant: native.Variant) -> Tensor:
            with use_variant(variant):
                return chain_linear(x, (next(turns),), None, (self.num_rows,))

        yield against_reading(
            run,
            lambda variant: expected.check(run(variant)),
            dtype=torch.float32,
            ours=native.default_variant(torch.float32),
            num_bytes=self.num_bytes,
        )


LINEAR_CASES = tuple(
    LinearCase(num_rows=num_rows, out_dim=out_dim, in_dim=in_dim, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for out_dim, in_dim in ((1536, 576), (576, 1536), (49152, 576), (4096, 4096))
    for num_rows in (1, 4, 16)
)
"""The feed-forward and the head of a model of 135M parameters, and a layer of one of 7B."""
