"""Operations that are counted by formula are those that the engine runs, one product after the other."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from colm_kernels.few_rows_linear import MAX_ROWS_OF_PAIRS
from torch.utils.flop_counter import FlopCounterMode

from bench.prefill.case import engine_of_random, prompt
from colm.flops import causal_attention_flops, prefill_flops
from tests.tiny import tiny_config

# Heads of a width and tiles of a size that the library leaves to PyTorch, whose products can be counted.
HEAD_DIM = 24
TILE_TOKENS = 1 + MAX_ROWS_OF_PAIRS

MODELS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gelu": {"activation": "gelu"},
    "biases": {"bias": True},
    "one layer": {"num_layers": 1},
    "one chain": {"chains": (8,), "num_layers": 3},
    "tied": {"tie_embeddings": True},
}


def seen_pairs(num_queries: int, num_keys: int) -> int:
    """Of the last queries and all keys, those that causality lets see one another, one by one."""
    first = num_keys - num_queries
    return sum(key <= first + query for query, key in product(range(num_queries), range(num_keys)))


def flash_flops(q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    """Of shapes (batch, heads, tokens, head dim)."""
    assert v == k
    assert dropout == 0
    batch, heads, num_queries, head_dim = q
    num_pairs = seen_pairs(num_queries, k[2]) if is_causal else num_queries * k[2]
    return batch * heads * num_pairs * (2 * head_dim + 2 * head_dim)  # the score, and the value weighted by it


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_flops}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("num_tiles", [1, 3])
def test_a_prefill_is_counted_as_the_engine_runs_it(overrides: dict[str, Any], num_tiles: int) -> None:
    config = tiny_config(explicit_head_dim=HEAD_DIM, **overrides)
    engine = engine_of_random(config, torch.float32, TILE_TOKENS, 0)
    token_ids = prompt(config, num_tiles * TILE_TOKENS, 0)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        for _ in engine.run(token_ids):
            pass
    assert prefill_flops(config, len(token_ids)) == counter.get_total_flops()


def test_what_chain_1_does_not_read_is_not_counted() -> None:
    config = tiny_config()
    assert prefill_flops(replace(config, vocab_size=9, tie_embeddings=True), 7) == prefill_flops(config, 7)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (4, 4), (5, 12)])
def test_attention_counts_the_pairs_that_the_mask_leaves(num_queries: int, num_keys: int) -> None:
    shape = {"num_queries": num_queries, "num_keys": num_keys, "num_heads": 3, "head_dim": 6}
    assert causal_attention_flops(**shape) == 3 * seen_pairs(num_queries, num_keys) * 4 * 6
