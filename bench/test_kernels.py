"""The cases of `bench.kernels` for pytest-benchmark: `make bench`."""

import pytest
import torch
from colm_kernels import native
from pytest_benchmark.fixture import BenchmarkFixture

from bench.kernels.decode import DECODE_CASES, DecodeCase, decode_contenders
from bench.kernels.linear import LINEAR_CASES, LinearCase, linear_contenders
from bench.kernels.prefill import PREFILL_CASES, TILE_CASES, PrefillCase, prefill_contenders
from bench.kernels.small import SMALL_CASES, SmallCase, small_contenders
from bench.kernels.sparse import SPARSE_CASES, SparseCase, sparse_contenders
from bench.kernels.staircase import STAIRCASE_CASES, StaircaseCase, staircase_contenders

ROUNDS = 3


@pytest.mark.parametrize("contender", ["ours", "sdpa"])
@pytest.mark.parametrize("case", [*PREFILL_CASES, *TILE_CASES], ids=lambda case: case.name)
def test_prefill_attention(benchmark: BenchmarkFixture, case: PrefillCase, contender: str) -> None:
    """Seconds of one call; the contenders are checked as they are made."""
    contenders = prefill_contenders(case)
    chosen = native.default_variant(case.dtype) if contender == "ours" else contender
    assert chosen in contenders, "the library is not built; run `python kernels/build.py`"
    benchmark.group = case.name
    benchmark.extra_info["gflop"] = case.flops / 1e9
    benchmark.pedantic(contenders[chosen], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("contender", ["ours", "torch"])
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_decode_attention(benchmark: BenchmarkFixture, case: DecodeCase, contender: str) -> None:
    """Seconds of one call; the contenders are checked as they are made."""
    contenders = decode_contenders(case)
    chosen = case.variant if contender == "ours" else contender
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = case.num_bytes
    benchmark.pedantic(contenders[chosen], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("contender", ["sparse", "dense"])
@pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.name)
def test_sparse_prefill_attention(benchmark: BenchmarkFixture, case: SparseCase, contender: str) -> None:
    """Seconds of one call; sparse is checked as it is made."""
    index = case.index()
    contenders = sparse_contenders(case, index)
    benchmark.group = case.name
    benchmark.extra_info["density"] = index.density()
    benchmark.pedantic(contenders[contender], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("contender", ["ours", "torch"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)
def test_few_rows_linear(benchmark: BenchmarkFixture, case: LinearCase, contender: str) -> None:
    """Seconds of one call; the contenders are checked as they are made."""
    contenders = linear_contenders(case)
    chosen = native.default_variant(torch.float32) if contender == "ours" else contender
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = case.num_bytes
    benchmark.pedantic(contenders[chosen], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("contender", ["ours", "full", "separate"])
@pytest.mark.parametrize("case", STAIRCASE_CASES, ids=lambda case: case.name)
def test_staircase(benchmark: BenchmarkFixture, case: StaircaseCase, contender: str) -> None:
    """Seconds of one call; the contenders are checked as they are made."""
    contenders = staircase_contenders(case)
    benchmark.group = case.name
    benchmark.extra_info["gflop"] = case.flops / 1e9
    benchmark.pedantic(contenders[contender], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("contender", ["ours", "torch"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_small_operations(benchmark: BenchmarkFixture, case: SmallCase, contender: str) -> None:
    """Seconds of many calls in a row; the contenders are checked as they are made."""
    contenders = small_contenders(case)
    chosen = native.default_variant(torch.float32) if contender == "ours" else contender
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = case.num_bytes
    benchmark.pedantic(contenders[chosen], rounds=ROUNDS, warmup_rounds=1)
