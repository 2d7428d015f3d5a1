"""Dense prefill attention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from colm_kernels import native, tolerance
from colm_kernels.native import use_variant
from colm_kernels.prefill_attention import prefill_attention
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.common import (
    SEED,
    Case,
    Contenders,
    gemm_ceiling,
    short,
    summarise,
    time_interleaved,
    timed_variants,
    with_ratios,
)

CHECKED_ROWS = 32
"""Last query rows of a case that are held against the definition."""


@dataclass(frozen=True, kw_only=True)
class PrefillCase(Case):
    """A tile of the last `num_queries` tokens against `num_keys` keys."""

    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """Shape as a metric's prefix."""
        return (
            f"prefill_{short(self.dtype)}_q{self.num_queries}_k{self.num_keys}"
            f"_h{self.num_heads}_kv{self.num_kv_heads}_d{self.head_dim}"
        )

    @property
    def flops(self) -> float:
        """Of the scores and values that the causal mask leaves."""
        prefix = self.num_keys - self.num_queries
        pairs = self.num_queries * prefix + self.num_queries * (self.num_queries + 1) / 2
        return 4.0 * self.num_heads * self.head_dim * pairs

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q_THD, k_KSD, v_KSD."""
        generator = torch.Generator().manual_seed(SEED)
        shapes = (
            (self.num_queries, self.num_heads, self.head_dim),
            *2 * ((self.num_kv_heads, self.num_keys, self.head_dim),),
        )
        q, k, v = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        return q, k, v

    def measure(self, num_rounds: int) -> dict[str, Any]:
        """Rates of every contender and of the GEMM, and the ratios the project's bars are set in."""
        contenders = dict(prefill_contenders(self))
        work = dict.fromkeys(contenders, self.flops)
        for dtype in {self.dtype, torch.float32}:
            name = f"gemm_{short(dtype)}"
            contenders[name], work[name] = gemm_ceiling(dtype)
        metrics = summarise(work, time_interleaved(contenders, num_rounds), "gflops_per_s")
        return with_ratios(
            metrics, native.default_variant(self.dtype), "gflops_per_s", "sdpa", f"gemm_{short(self.dtype)}"
        )


PREFILL_CASES = (
    PrefillCase(num_queries=8192, num_keys=8192, num_heads=8, num_kv_heads=8, head_dim=64),
    PrefillCase(num_queries=4096, num_keys=4096, num_heads=8, num_kv_heads=8, head_dim=80),
    PrefillCase(num_queries=4096, num_keys=4096, num_heads=8, num_kv_heads=8, head_dim=96),
    PrefillCase(num_queries=4096, num_keys=4096, num_heads=8, num_kv_heads=8, head_dim=128),
    PrefillCase(num_queries=4096, num_keys=4096, num_heads=32, num_kv_heads=8, head_dim=64),
    PrefillCase(num_queries=4096, num_keys=4096, num_heads=8, num_kv_heads=8, head_dim=64, dtype=torch.float32),
)
TILE_CASES = tuple(
    PrefillCase(num_queries=num_queries, num_keys=num_keys, num_heads=9, num_kv_heads=3, head_dim=64)
    for num_queries in (512, 1024)
    for num_keys in (1024, 4096, 16384, 32768)
)
"""What the prefill engine calls: a tile against a growing prefix."""


def prefill_contenders(case: PrefillCase) -> Contenders:
    """Every variant of this machine and SDPA, on the same inputs; refuses to time a wrong kernel."""
    q, k, v = case.inputs()
    _check_prefill(q, k, v)

    def run(variant: native.Variant) -> object:
        with use_variant(variant):
            return prefill_attention(q, k, v)

    def sdpa() -> object:
        if case.num_queries < case.num_keys:
            return run("torch")  # SDPA of prefix and tile, merged
        q_BHTD, k_BKSD, v_BKSD = q.transpose(0, 1)[None], k[None], v[None]
        return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=True)

    contenders: dict[str, Callable[[], object]] = {"sdpa": sdpa}
    for variant in timed_variants(case.dtype):
        contenders[variant] = partial(run, variant)
    return contenders


def _check_prefill(q: Tensor, k: Tensor, v: Tensor) -> None:
    # Rows are independent of one another, so the last ones of the whole result are those of a small tile.
    expected = tolerance.prefill_attention(q[-CHECKED_ROWS:], k, v)
    for variant in timed_variants(q.dtype):
        with use_variant(variant):
            out, lse = prefill_attention(q, k, v)
        tolerance.check_all(expected, (out[-CHECKED_ROWS:], lse[-CHECKED_ROWS:]))
