"""The kernels against PyTorch's own and against what the machine can do: `python -m bench.kernels --json`.

Every case is first held against the definition. Then the contenders of the case run in turn, round after round, so
that a ratio never compares two moments of a busy machine.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from colm_kernels import native, tolerance
from colm_kernels.chain_linear import chain_linear, chain_linear_reference
from colm_kernels.decode_attention import decode_attention, decode_attention_reference
from colm_kernels.native import use_variant
from colm_kernels.prefill_attention import prefill_attention, prefill_attention_reference
from torch import Tensor
from torch.nn import functional as F

from bench import record

SEED = 0
CHECKED_ROWS = 32
"""Last query rows of a prefill case that are held against the definition."""
PAGE_TOKENS = 16
CACHE_BYTES = 512 << 20
"""More than the caches hold, of a server's CPU too."""

Contenders = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillCase:
    """A tile of the last `num_queries` tokens against `num_keys` keys."""

    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Shape as a metric's prefix."""
        return (
            f"prefill_{_short(self.dtype)}_q{self.num_queries}_k{self.num_keys}"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCase:
    """One query token a request against `context_len` cached tokens."""

    batch: int
    context_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Shape as a metric's prefix."""
        return (
            f"decode_{_short(self.dtype)}_b{self.batch}_k{self.context_len}"
            f"_h{self.num_kv_heads * self.group}_kv{self.num_kv_heads}_d{self.head_dim}"
        )

    @property
    def num_bytes(self) -> int:
        """Keys and values that one call reads."""
        per_token = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return self.batch * self.context_len * per_token

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q_RKGD, k_pages_BPKD, v_pages_BPKD, block_table_RM in random order, context_lens_R."""
        generator = torch.Generator().manual_seed(SEED)
        num_pages = self.batch * self.context_len // PAGE_TOKENS
        shape = (num_pages, PAGE_TOKENS, self.num_kv_heads, self.head_dim)
        k_pages, v_pages = (torch.randn(shape, generator=generator).to(self.dtype) for _ in "kv")
        q = torch.randn(self.batch, self.num_kv_heads, self.group, self.head_dim, generator=generator)
        block_table = torch.randperm(num_pages, generator=generator).to(torch.int32).view(self.batch, -1)
        context_lens = torch.full((self.batch,), self.context_len, dtype=torch.int32)
        return q.to(self.dtype), k_pages, v_pages, block_table, context_lens


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearCase:
    """A few rows through one weight matrix, as in decode."""

    num_rows: int
    in_dim: int
    out_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Shape as a metric's prefix."""
        return f"linear_{_short(self.dtype)}_r{self.num_rows}_o{self.out_dim}_i{self.in_dim}"

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
DECODE_CASES = (
    DecodeCase(batch=1, context_len=65536, num_kv_heads=8, group=1, head_dim=64),
    DecodeCase(batch=1, context_len=65536, num_kv_heads=8, group=4, head_dim=64),
    DecodeCase(batch=8, context_len=65536, num_kv_heads=2, group=4, head_dim=64),
)
LINEAR_CASES = tuple(
    LinearCase(num_rows=num_rows, out_dim=out_dim, in_dim=in_dim, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for out_dim, in_dim in ((1536, 576), (576, 1536), (49152, 576), (4096, 4096))
    for num_rows in (1, 4, 16)
)
"""The feed-forward and the head of a model of 135M parameters, and a layer of one of 7B."""


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


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
    for variant in _timed_variants(case.dtype):
        contenders[variant] = partial(run, variant)
    return contenders


def _check_prefill(q: Tensor, k: Tensor, v: Tensor) -> None:
    # Rows are independent of one another, so the last ones of the whole result are those of a small tile.
    last = q[-CHECKED_ROWS:]
    reference, reference_lse = prefill_attention_reference(last.double(), k.double(), v.double())
    with use_variant("torch"):
        eager, eager_lse = prefill_attention(last, k, v)
    for variant in _timed_variants(q.dtype):
        with use_variant(variant):
            out, lse = prefill_attention(q, k, v)
        tolerance.assert_within_budget(out[-CHECKED_ROWS:], eager, reference)
        tolerance.assert_lse_within_budget(q.dtype, lse[-CHECKED_ROWS:], eager_lse, reference_lse)


def decode_contenders(case: DecodeCase) -> Contenders:
    """Every variant of this machine and the PyTorch path; refuses to time a wrong kernel."""
    arguments = case.inputs()
    q, k_pages, v_pages, *table = arguments
    reference = decode_attention_reference(q.double(), k_pages.double(), v_pages.double(), *table)

    def run(variant: native.Variant) -> Tensor:
        with use_variant(variant):
            return decode_attention(*arguments)

    eager = run("torch")
    contenders: dict[str, Callable[[], object]] = {"torch": partial(run, "torch")}
    for variant in _timed_variants(torch.float32):
        tolerance.assert_within_budget(run(variant), eager, reference)
        contenders[variant] = partial(run, variant)
    return contenders


def linear_contenders(case: LinearCase) -> Contenders:
    """Every variant of this machine and F.linear, going through the weights in turn; refuses to time a wrong kernel."""
    x, weights = case.inputs()
    reference = chain_linear_reference(x.double(), [weights[0].double()], None, (case.num_rows,))
    turns = itertools.cycle(weights)

    @torch.inference_mode()
    def run(variant: native.Variant) -> Tensor:
        with use_variant(variant):
            return chain_linear(x, (next(turns),), None, (case.num_rows,))

    eager = run("torch")
    contenders: dict[str, Callable[[], object]] = {"torch": partial(run, "torch")}
    for variant in _timed_variants(torch.float32):
        tolerance.assert_within_budget(run(variant), eager, reference)
        contenders[variant] = partial(run, variant)
    return contenders


def _timed_variants(dtype: torch.dtype) -> list[native.Variant]:
    # avx512_bf16 differs from avx512 in bf16 prefill alone.
    left_out = {"torch"} if dtype == torch.bfloat16 else {"torch", "avx512_bf16"}
    return [variant for variant in native.available_variants() if variant not in left_out]


def gemm_ceiling(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A matrix product that PyTorch runs at its best, and its floating point operations."""
    rows, inner, columns = 2048, 1024, 2048
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return lambda: F.linear(x, weight), 2.0 * rows * inner * columns


def read_ceiling() -> tuple[Callable[[], object], int]:
    """A sum over memory far larger than the caches, and its bytes."""
    numbers = torch.ones(256 << 18)
    return numbers.sum, numbers.nbytes


def time_interleaved(contenders: Contenders, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for timed in [False] + [True] * num_rounds:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if timed:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(work: Mapping[str, float], seconds: Mapping[str, list[float]], unit: str) -> dict[str, Any]:
    """Median, extremes and count of the rates (10^9 units of work a second)."""
    metrics: dict[str, Any] = {}
    for name, times in seconds.items():
        rates = sorted(work[name] / s / 1e9 for s in times)
        metrics[f"{name}_{unit}"] = {
            "median": round(median(rates), 1),
            "min": round(rates[0], 1),
            "max": round(rates[-1], 1),
            "n": len(rates),
        }
    return metrics


def measure_prefill(case: PrefillCase, num_rounds: int) -> dict[str, Any]:
    """Rates of every contender and of the GEMM, and the ratios the project's bars are set in."""
    contenders = dict(prefill_contenders(case))
    work = dict.fromkeys(contenders, case.flops)
    for dtype in {case.dtype, torch.float32}:
        name = f"gemm_{_short(dtype)}"
        contenders[name], work[name] = gemm_ceiling(dtype)
    metrics = summarise(work, time_interleaved(contenders, num_rounds), "gflops_per_s")
    return _with_ratios(metrics, case.dtype, "gflops_per_s", "sdpa", f"gemm_{_short(case.dtype)}")


def measure_decode(case: DecodeCase, num_rounds: int) -> dict[str, Any]:
    """Rates of every contender and of plain reading."""
    contenders = dict(decode_contenders(case))
    work: dict[str, float] = dict.fromkeys(contenders, float(case.num_bytes))
    contenders["read"], work["read"] = read_ceiling()
    metrics = summarise(work, time_interleaved(contenders, num_rounds), "gb_per_s")
    return _with_ratios(metrics, torch.float32, "gb_per_s", "torch", "read")


def measure_linear(case: LinearCase, num_rounds: int) -> dict[str, Any]:
    """Rates of every contender and of plain reading."""
    contenders = dict(linear_contenders(case))
    work: dict[str, float] = dict.fromkeys(contenders, float(case.num_bytes))
    contenders["read"], work["read"] = read_ceiling()
    metrics = summarise(work, time_interleaved(contenders, num_rounds), "gb_per_s")
    return _with_ratios(metrics, torch.float32, "gb_per_s", "torch", "read")


def _with_ratios(metrics: dict[str, Any], dtype: torch.dtype, unit: str, *against: str) -> dict[str, Any]:
    chosen = native.default_variant(dtype)
    if f"{chosen}_{unit}" in metrics:
        ours = metrics[f"{chosen}_{unit}"]["median"]
        metrics |= {f"over_{name}_x": round(ours / metrics[f"{name}_{unit}"]["median"], 2) for name in against}
    return metrics


def environment(command: str) -> dict[str, Any]:
    """What a record begins with, and which variants of the kernels this machine takes."""
    chosen = {_short(dtype): native.default_variant(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return record.environment(command, SEED) | {"variants": native.available_variants(), "default_variants": chosen}


def _row(name: str, metrics: Mapping[str, Any]) -> str:
    cells = [
        f"{key}={value['median']:g} [{value['min']:g}..{value['max']:g}]"
        if isinstance(value, dict)
        else f"{key}={value:g}"
        for key, value in metrics.items()
    ]
    return f"{name}\n    " + "\n    ".join(cells)


def main() -> None:
    """Run the cases; the last line of stdout is the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON record")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each case")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and of the kernels; its own setting")
    parser.add_argument("--only", choices=["prefill", "tile", "decode", "linear"], help="one group of cases")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    result = environment(" ".join(["python", "-m", "bench.kernels", *sys.argv[1:]])) | {"cases": []}
    groups: dict[str, tuple[PrefillCase | DecodeCase | LinearCase, ...]] = {
        "prefill": PREFILL_CASES,
        "tile": TILE_CASES,
        "decode": DECODE_CASES,
        "linear": LINEAR_CASES,
    }
    for group, cases in groups.items():
        if options.only not in (None, group):
            continue
        for case in cases:
            if isinstance(case, PrefillCase):
                metrics = measure_prefill(case, options.rounds)
            elif isinstance(case, LinearCase):
                metrics = measure_linear(case, options.rounds)
            else:
                metrics = measure_decode(case, options.rounds)
            shape = asdict(case) | {"dtype": _short(case.dtype)}
            result["cases"].append({"name": case.name, "shape": shape, "metrics": metrics})
            sys.stdout.write(_row(case.name, metrics) + "\n")
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
