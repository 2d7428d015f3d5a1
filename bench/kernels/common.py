"""What every operation's benchmark shares: contenders that run in turn, ceilings of the machine, rates and ratios."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from colm_kernels import native
from colm_kernels.tolerance import Expected
from torch import Tensor
from torch.nn import functional as F

SEED = 0

Contenders = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One shape of one operation."""

    dtype: torch.dtype = torch.bfloat16

    @property
    @abstractmethod
    def name(self) -> str:
        """Shape as a metric's prefix."""

    @abstractmethod
    def measure(self, num_rounds: int) -> dict[str, Any]:
        """Check every contender, then time them in turn."""


def short(dtype: torch.dtype) -> str:
    """A dtype as metrics spell it."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def timed_variants(dtype: torch.dtype) -> list[native.Variant]:
    """The library's variants that differ for inputs of a dtype."""
    # avx512_bf16 differs from avx512 in attention over bf16 alone.
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


def checked_contenders(
    run: Callable[[native.Variant], Tensor], expected: Expected, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """The PyTorch path and every variant that differs for a dtype; refuses to time a wrong kernel."""
    contenders: dict[str, Callable[[], object]] = {}
    for variant in ("torch", *timed_variants(dtype)):
        expected.check(run(variant))
        contenders[variant] = partial(run, variant)
    return contenders


def measure_against_reading(
    contenders: Contenders, num_bytes: float, chosen: native.Variant, num_rounds: int
) -> dict[str, Any]:
    """Rates of contenders that each read num_bytes, and of plain reading."""
    work = dict.fromkeys(contenders, float(num_bytes))
    read, work["read"] = read_ceiling()
    metrics = summarise(work, time_interleaved({**contenders, "read": read}, num_rounds), "gb_per_s")
    return with_ratios(metrics, chosen, "gb_per_s", "torch", "read")


def with_ratios(metrics: dict[str, Any], chosen: native.Variant, unit: str, *against: str) -> dict[str, Any]:
    """Add what the variant that runs by default reaches of other contenders' rates."""
    if f"{chosen}_{unit}" in metrics:
        ours = metrics[f"{chosen}_{unit}"]["median"]
        metrics |= {f"over_{name}_x": round(ours / metrics[f"{name}_{unit}"]["median"], 2) for name in against}
    return metrics
