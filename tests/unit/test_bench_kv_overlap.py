"""The benchmark of what the KV stream adds, on a model that is computed at once."""

import pytest
import torch

from bench.harness.contest import measure
from bench.kv_overlap import BAR_X, NUM_CHECKED_TOKENS, OverlapCase
from tests.tiny import tiny_config


def test_the_stream_is_checked_and_held_against_its_own_engine() -> None:
    config = tiny_config(num_layers=2, max_context=2 * NUM_CHECKED_TOKENS)
    case = OverlapCase(model="tiny", config=config, dtype=torch.float32, num_tokens=NUM_CHECKED_TOKENS + 1)
    with case.contest(seed=0) as contest:
        result = measure(contest, num_rounds=1)
    engine = result.seen["engine"]
    for name in ("stream", "shared_memory"):
        seen = result.seen[name]
        assert seen["over_engine_x"].median == pytest.approx(seen["s"].median / engine["s"].median)
        left_s = seen["s"].median - seen["stream_cpu_s"].median / torch.get_num_threads()
        assert seen["of_bar_fraction"].median == pytest.approx(left_s / engine["s"].median / BAR_X)
