"""What a prefill was said to take, against what it takes in a process of its own."""

import ctypes
import itertools
from collections import deque

import numpy as np
import psutil
import pytest
import torch

from bench.harness.environment import in_fresh_process, peak_memory_bytes
from bench.prefill.case import engine_of_random
from colm.model.config import ChainConfig
from prefill_node.engine import PrefillEngine
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import AuditPolicy, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.tiny import tiny_config

IN_PYTORCH, IN_THE_LIBRARY = 32, 64
"""Head dims whose attention runs there; of the library's is less to wait for."""
TILE_TOKENS = 512


def wide(head_dim: int) -> ChainConfig:
    """Hidden states as large as keys and values, and little attention to wait for."""
    num_heads, widths = 256 // head_dim, {"dim": 1024, "hidden_dim": 1024, "explicit_head_dim": head_dim}
    return tiny_config(chains=(num_heads,), num_kv_heads=num_heads, num_layers=2, max_context=1 << 20, **widths)


def wide_engine(dtype: torch.dtype, head_dim: int) -> PrefillEngine:
    return engine_of_random(wide(head_dim), dtype, TILE_TOKENS, 0)


def held_bytes() -> int:
    """Resident memory, without what the allocator keeps of freed memory: the next run would take that unseen."""
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def growth_bytes(num_tokens: int, dtype: torch.dtype, head_dim: int) -> int:
    """The body of the process: one layer and a tile, of a short prompt first, for what libraries set up once."""
    engine = wide_engine(dtype, head_dim)
    for each in (2 * TILE_TOKENS, num_tokens):
        before = held_bytes()
        steps = itertools.islice(engine.run(np.zeros(each, dtype=np.int64)), each // TILE_TOKENS + 1)
        deque(steps, maxlen=0)
    return peak_memory_bytes() - before


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "head_dim"),
    [(16 << 10, torch.float32, IN_PYTORCH), (32 << 10, torch.bfloat16, IN_THE_LIBRARY)],
)
def test_the_predicted_peak_of_a_run_is_the_measured_one(num_tokens: int, dtype: torch.dtype, head_dim: int) -> None:
    predicted_bytes = wide_engine(dtype, head_dim).memory_bytes(num_tokens)
    assert in_fresh_process(growth_bytes, num_tokens, dtype, head_dim) == pytest.approx(predicted_bytes, rel=0.15)


def sparse_growth_bytes(num_tokens: int, policy: SparsePolicy, head_dim: int) -> int:
    """The same of a sparse run, with the first layer's plan, audit and some of its attention."""
    engine = wide_engine(torch.float32, head_dim)
    for each in (8 * TILE_TOKENS, num_tokens):  # the first one is long enough to be planned, too
        before = held_bytes()
        run = engine.run(np.arange(each) % wide(head_dim).vocab_size, sparse=sparse_plans(policy, head_dim))
        tile = next(run)
        while tile.layer == 0:
            tile = next(run)
        while tile.num_tokens == 0:  # the plan, and every tile's attention
            tile = next(run)
    return peak_memory_bytes() - before


def sparse_plans(policy: SparsePolicy, head_dim: int) -> PromptPlans:
    return PromptPlans(SparsePlanner(wide(head_dim), policy), AuditPolicy(floor=0.0))


@pytest.mark.parametrize(
    ("policy", "head_dim"),
    [
        (SparsePolicy(mass=None, keys_per_row=1024, dense_below_tokens=0), IN_THE_LIBRARY),
        (SparsePolicy(mass=0.5, dense_below_tokens=0), IN_PYTORCH),
    ],
    ids=["by keys", "by mass"],
)
def test_the_predicted_peak_of_a_sparse_run_is_the_measured_one(policy: SparsePolicy, head_dim: int) -> None:
    num_tokens = 32 << 10
    predicted_bytes = wide_engine(torch.float32, head_dim).memory_bytes(num_tokens, sparse_plans(policy, head_dim))
    measured_bytes = in_fresh_process(sparse_growth_bytes, num_tokens, policy, head_dim)
    assert measured_bytes == pytest.approx(predicted_bytes, rel=0.15)
