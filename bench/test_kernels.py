"""The cases of `bench.kernels` for pytest-benchmark: `make bench`."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.kernels.__main__ import GROUPS
from bench.kernels.common import KernelCase

SEED = 0
ROUNDS = 3


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("case", [case for group in GROUPS.values() for case in group], ids=lambda case: case.name)
def test_kernel(benchmark: BenchmarkFixture, case: KernelCase, whose: str) -> None:
    """Time one turn of ours, or of the first contender that it is compared with, after checking ours."""
    with case.contest(SEED) as contest:
        assert contest.ours is not None, "the library is not built; run `python kernels/build.py`"
        contest.check()
        benchmark.group = case.name
        benchmark.extra_info |= case.shape
        turn = contest.contenders[contest.ours if whose == "ours" else contest.against[0]]
        benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=1)
