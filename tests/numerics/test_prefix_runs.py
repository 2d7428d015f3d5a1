"""A run that begins behind what was kept computes the rest alone, to the bit of a run of everything.

Shapes: see `prefill_node/engine.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.kv import KvFormat, KvTile
from prefill_node.engine import PrefillEngine
from prefill_node.prefill_run import PrefillRun
from prefill_node.prefix_cache import PrefixCache, PrefixHold
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

TILE_TOKENS = 8
MODELS: dict[str, dict[str, Any]] = {
    "small heads": {},
    "heads of the native kernel": {"dim": 8 * 64},
    "one query head a kv head": {"chains": (2, 2)},
    "three layers": {"num_layers": 3},
    "one layer": {"num_layers": 1},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "model", tiny_config(**request.param))


def tiles_of(engine: PrefillEngine, run: PrefillRun, hold: PrefixHold | None = None) -> list[KvTile]:
    tiles = []
    while not run.is_over:
        (tile,) = engine.step([run])
        assert tile is not None, run.error
        if hold is not None:
            hold.keep(tile)
        tiles.append(KvTile(tile.layer, tile.first_token, tile.k_KTD.clone(), tile.v_KTD.clone()))
    return tiles


@pytest.mark.parametrize("in_one_call", [True, False], ids=["in one call", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_behind_a_kept_prefix_has_the_bits_of_a_run_of_everything(
    checkpoint: Checkpoint, dtype: torch.dtype, in_one_call: bool
) -> None:
    kv_format = KvFormat.of(checkpoint.config, dtype)
    engine = PrefillEngine(checkpoint, kv_format, tile_tokens=TILE_TOKENS, in_one_call=in_one_call)
    prompt = np.random.default_rng(5).integers(0, 320, 4 * TILE_TOKENS + 3)
    for length in (1, TILE_TOKENS, TILE_TOKENS + 1, len(prompt)):
        cold = tiles_of(engine, engine.begin(prompt[:length]))
        for num_kept in {0, 1, TILE_TOKENS, 2 * TILE_TOKENS, 4 * TILE_TOKENS, length}:
            if num_kept > length:
                continue
            cache = PrefixCache(kv_format, tile_tokens=TILE_TOKENS, budget_bytes=1 << 30)
            earlier = cache.hold(prompt[:num_kept], b"") if num_kept else PrefixHold()
            cache.begin(earlier, is_alone=True)
            if num_kept:
                tiles_of(engine, engine.begin(prompt[:num_kept]), earlier)
            cache.close(earlier)
            hold = cache.hold(prompt[:length], b"")
            assert hold.num_cached_tokens == (num_kept if num_kept == length else num_kept // TILE_TOKENS * TILE_TOKENS)
            if hold.num_cached_tokens == length:
                continue  # nothing is left to run
            run = engine.begin(prompt[:length], prefix=hold.read)
            warm = tiles_of(engine, run)
            behind = [tile for tile in cold if tile.first_token >= hold.num_cached_tokens]
            for ours, right in zip(warm, behind, strict=True):
                assert (ours.layer, ours.first_token) == (right.layer, right.first_token)
                assert all(torch.equal(*pair) for pair in zip(ours.tensors, right.tensors, strict=True))
            assert len(run.hidden_ND) == length - hold.num_cached_tokens
