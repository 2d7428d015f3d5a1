"""Linear (chain) of few rows, as in decode."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from colm_kernels import native, tolerance
from colm_kernels.chain_linear import chain_linear
from colm_kernels.native import use_variant
from colm_kernels.panels import Panels, in_panels, panels_shape, pays
from torch import Tensor

from bench.harness.contest import Contest, timed
from bench.kernels.common import KernelCase, against_reading, short, timed_as
from colm.huge_pages import empty_side_by_side, side_by_side

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
        """x_RI and equal weights, so many that the caches no longer hold a weight when its turn comes again.

        They lie in huge pages where the system has them, as a node's do.
        """
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.num_rows, self.in_dim, generator=generator).to(self.dtype)
        weight = torch.randn(self.out_dim, self.in_dim, generator=generator).to(self.dtype)
        copies = dict.fromkeys(map(str, range(-(-CACHE_BYTES // self.num_bytes))), weight)
        return x, list(side_by_side(copies, self.dtype).values())

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Every variant of this machine, F.linear and plain reading, going through the weights in turn.

        Where weights in panels pay, they are `ours`, and the default variant over weights by rows runs beside them.
        """
        x, weights = self.inputs(seed)
        expected = tolerance.linear(x, weights[:1], None, (self.num_rows,))
        turns = itertools.cycle(weights)

        @torch.inference_mode()
        def run(variant: native.Variant) -> Tensor:
            with use_variant(variant):
                return chain_linear(x, (next(turns),), None, (self.num_rows,))

        ours = native.default_variant(self.dtype)
        contest = against_reading(
            run,
            lambda variant: expected.check(run(variant)),
            dtype=self.dtype,
            ours=ours,
            num_bytes=self.num_bytes,
        )
        if not pays(self.dtype):
            yield contest
            return
        panels = itertools.cycle(_in_panels(weights))

        @torch.inference_mode()
        def run_panels() -> Tensor:
            return chain_linear(x, (next(panels),), None, (self.num_rows,))

        def check() -> None:
            contest.check()
            expected.check(run_panels())

        yield replace(
            contest,
            check=check,
            contenders={**contest.contenders, "panels": timed(run_panels, gb=self.num_bytes / 1e9)},
            ours="panels",
            against=(*contest.against, timed_as(ours, self.dtype)),
        )


def _in_panels(weights: list[Tensor]) -> list[Panels]:
    shape = panels_shape(weights[0].shape, weights[0].dtype)
    places = empty_side_by_side(dict.fromkeys(map(str, range(len(weights))), shape), weights[0].dtype)
    return [in_panels(weight, place) for weight, place in zip(weights, places.values(), strict=True)]


LINEAR_CASES = tuple(
    LinearCase(num_rows=num_rows, out_dim=out_dim, in_dim=in_dim, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for out_dim, in_dim in ((1536, 576), (576, 1536), (49152, 576), (4096, 4096))
    for num_rows in (1, 4, 16, 64)
)
"""The feed-forward and the head of a model of 135M parameters, and a layer of one of 7B."""
