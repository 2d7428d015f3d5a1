"""Shared by every operation's benchmark: cases with a dtype, the machine's variants, and the machine's limits."""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from colm_kernels import native
from torch.nn import functional as F

from bench.harness.contest import Case, Contest, Run, timed


@dataclass(frozen=True, kw_only=True)
class KernelCase(Case, ABC):
    """One shape of one operation."""

    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, Any]:
        """The fields, with dtypes abbreviated."""
        return asdict(self, dict_factory=_plain)


def _plain(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: short(value) if isinstance(value, torch.dtype) else value for name, value in fields}


def short(dtype: torch.dtype) -> str:
    """A dtype's abbreviation in records."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def timed_as(variant: native.Variant, dtype: torch.dtype) -> native.Variant:
    """The variant under whose name this one is timed: avx512_bf16 differs from avx512 only in attention over bf16."""
    return "avx512" if variant == "avx512_bf16" and dtype != torch.bfloat16 else variant


def timed_variants(dtype: torch.dtype) -> list[native.Variant]:
    """The library's variants that differ for inputs of a dtype."""
    return [each for each in native.available_variants() if each != "torch" and timed_as(each, dtype) == each]


def gemm_ceiling(dtype: torch.dtype, rows: int = 2048, inner: int = 1024, columns: int = 2048) -> Run:
    """A matrix product at PyTorch's full rate."""
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return timed(lambda: F.linear(x, weight), gflops=2.0 * rows * inner * columns / 1e9)


def read_ceiling() -> Run:
    """A sum over memory far larger than the caches."""
    numbers = torch.ones(256 << 18)
    return timed(numbers.sum, gb=numbers.nbytes / 1e9)


def against_reading(
    run: Callable[[native.Variant], object],
    check: Callable[[native.Variant], None],
    *,
    dtype: torch.dtype,
    ours: native.Variant,
    num_bytes: int,
    num_calls: int = 1,
) -> Contest:
    """The PyTorch path, every variant that differs for a dtype, and plain reading.

    Args:
        run: the work that a variant is timed at.
        check: compares a variant's result with the definition.
        dtype: dtype of the inputs, for which variants may differ.
        ours: the variant that runs by default.
        num_bytes: bytes that one call reads and writes.
        num_calls: calls that `run` makes.
    """
    variants: list[native.Variant] = ["torch", *timed_variants(dtype)]

    def check_variants() -> None:
        for variant in variants:
            check(variant)

    def turn(variant: native.Variant) -> Run:
        return timed(partial(run, variant), num_calls=num_calls, gb=num_bytes / 1e9)

    return Contest(
        check=check_variants,
        contenders={**{str(variant): turn(variant) for variant in variants}, "read": read_ceiling()},
        ours=timed_as(ours, dtype),
        against=("torch", "read"),
        compared_by="gb_per_s",
    )
