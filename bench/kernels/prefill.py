"""Dense prefill attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from colm_kernels import native, tolerance
from colm_kernels.native import use_variant
from colm_kernels.prefill_attention import prefill_attention
from torch import Tensor
from torch.nn import functional as F

from bench.harness.contest import Contest, timed
from bench.kernels.common import KernelCase, gemm_ceiling, short, timed_as, timed_variants
from colm.flops import causal_attention_flops

CHECKED_ROWS = 32
"""Last query rows of a case that are compared with the definition."""


@dataclass(frozen=True, kw_only=True)
class PrefillCase(KernelCase):
    """A tile of the last `num_queries` tokens against `num_keys` keys."""

    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """The shape in one word."""
        return (
            f"prefill_{short(self.dtype)}_q{self.num_queries}_k{self.num_keys}"
            f"_h{self.num_heads}_kv{self.num_kv_heads}_d{self.head_dim}"
        )

    @property
    def flops(self) -> int:
        """Floating point operations on the scores and values that the causal mask leaves."""
        return causal_attention_flops(
            num_queries=self.num_queries, num_keys=self.num_keys, num_heads=self.num_heads, head_dim=self.head_dim
        )

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """q_THD, k_KSD, v_KSD."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (
            (self.num_queries, self.num_heads, self.head_dim),
            *2 * ((self.num_kv_heads, self.num_keys, self.head_dim),),
        )
        q, k, v = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        return q, k, v

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Every variant of this machine, SDPA on the same inputs, and the GEMM to which the project's targets refer."""
        q, k, v = self.inputs(seed)
        variants = timed_variants(self.dtype)

        def run(variant: native.Variant) -> tuple[Tensor, Tensor]:
            with use_variant(variant):
                return prefill_attention(q, k, v)

        def sdpa() -> object:
            if self.num_queries < self.num_keys:
                return run("torch")  # SDPA of prefix and tile, merged
            q_BHTD, k_BKSD, v_BKSD = q.transpose(0, 1)[None], k[None], v[None]
            return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=True)

        def check() -> None:
            # Rows are independent of one another, so the last ones of the whole result are those of a small tile.
            expected = tolerance.prefill_attention(q[-CHECKED_ROWS:], k, v)
            for variant in variants:
                tolerance.check_all(expected, (part[-CHECKED_ROWS:] for part in run(variant)))

        calls = {"sdpa": sdpa} | {variant: partial(run, variant) for variant in variants}
        ours = timed_as(native.default_variant(self.dtype), self.dtype)
        yield Contest(
            check=check,
            contenders={name: timed(call, gflops=self.flops / 1e9) for name, call in calls.items()}
            | {f"gemm_{short(dtype)}": gemm_ceiling(dtype) for dtype in dict.fromkeys((self.dtype, torch.float32))},
            ours=ours if ours in calls else None,
            against=("sdpa", f"gemm_{short(self.dtype)}"),
            compared_by="gflops_per_s",
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
