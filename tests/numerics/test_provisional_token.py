"""Chain 1's own next token, from the prefill engine: it is the plain model's, and no tile has other bits for it.

Shapes: see `prefill_node/engine.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels.few_rows_linear import MAX_ROWS, MAX_ROWS_OF_PAIRS, library_variant
from colm_kernels.native import CancelFlag
from numpy.typing import NDArray

from colm.checkpoint import Checkpoint
from colm.kv import KvFormat, KvTile
from prefill_node.engine import PrefillEngine
from prefill_node.prefill_run import PrefillRun
from prefill_node.prefix_cache import PrefixCache
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import ROW_BLOCK, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

TILE_TOKENS = 8
FEW = SparsePolicy(mass=None, keys_per_row=260, local_tokens=64, dense_below_tokens=0)
MODELS: dict[str, dict[str, Any]] = {
    "own head": {},
    "tied head": {"tie_embeddings": True},
    "heads of the native kernel": {"dim": 8 * 64},
    "one query head a kv head, one layer": {"chains": (2, 2), "num_layers": 1},
    "biases, not gated": {"bias": True, "activation": "gelu"},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "model", tiny_config(**request.param))


def engine_of(
    checkpoint: Checkpoint,
    *,
    tile_tokens: int = TILE_TOKENS,
    in_one_call: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PrefillEngine:
    kv_format = KvFormat.of(checkpoint.config, dtype)
    return PrefillEngine(checkpoint, kv_format, tile_tokens=tile_tokens, in_one_call=in_one_call)


def prompt(num_tokens: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng([num_tokens, seed]).integers(0, 320, num_tokens)


def tiles_of(engine: PrefillEngine, runs: Sequence[PrefillRun]) -> list[list[KvTile]]:
    """All tiles of runs that share every step."""
    tiles: list[list[KvTile]] = [[] for _ in runs]
    while not runs[0].is_over:
        for made, tile, run in zip(tiles, engine.step(runs), runs, strict=True):
            assert tile is not None, run.error
            made.append(KvTile(tile.layer, tile.first_token, tile.k_KTD.clone(), tile.v_KTD.clone()))
    return tiles


def assert_same(ours: Sequence[KvTile], right: Sequence[KvTile]) -> None:
    assert [(tile.layer, tile.first_token) for tile in ours] == [(tile.layer, tile.first_token) for tile in right]
    for one, other in zip(ours, right, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.tensors, other.tensors, strict=True))


def assert_plain(checkpoint: Checkpoint, run: PrefillRun) -> None:
    assert run.next_token_id is not None
    assert run.last_token_id is not None
    assert_greedy(checkpoint.load(1), [*run.token_ids.tolist(), run.last_token_id], [run.next_token_id], 1)


@pytest.mark.parametrize("in_one_call", [True, False], ids=["in one call", "modules"])
@pytest.mark.parametrize("length", [1, TILE_TOKENS, 3 * TILE_TOKENS + 5])
def test_the_next_token_is_the_plain_models_and_tiles_keep_their_bits(
    checkpoint: Checkpoint, length: int, in_one_call: bool
) -> None:
    engine = engine_of(checkpoint, in_one_call=in_one_call)
    run = engine.begin(prompt(length), last_token_id=7)
    (tiles,) = tiles_of(engine, [run])
    assert_plain(checkpoint, run)
    (plain,) = tiles_of(engine, [engine.begin(prompt(length))])
    assert_same(tiles, plain)


@pytest.mark.parametrize("num_rows", [MAX_ROWS - 1, MAX_ROWS, MAX_ROWS_OF_PAIRS - 1, MAX_ROWS_OF_PAIRS, 79, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_rides_on_the_last_tile_changes_no_bit_of_it(
    tmp_path: Path, dtype: torch.dtype, num_rows: int
) -> None:
    """Around the numbers of rows at which other products are used; there, and by PyTorch's, it runs by itself."""
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_config(dim=8 * 64, num_layers=3))
    engine = engine_of(checkpoint, tile_tokens=80, dtype=dtype)
    token_ids = prompt(80 + num_rows)
    run = engine.begin(token_ids, last_token_id=7)
    (tiles,), (plain,) = tiles_of(engine, [run]), tiles_of(engine, [engine.begin(token_ids)])
    assert_same(tiles, plain)
    assert run.next_token_id is not None
    if dtype == torch.float32:
        assert_plain(checkpoint, run)
    else:  # one product computes both numbers of rows, or the row runs by itself
        assert run.rides <= (library_variant(num_rows, dtype) == library_variant(num_rows + 1, dtype))


@pytest.mark.parametrize("num_kept", [2 * TILE_TOKENS, 2 * TILE_TOKENS + 3], ids=["the beginning", "all"])
def test_what_was_kept_is_read_and_not_computed_for_it(tmp_path: Path, num_kept: int) -> None:
    """A prompt whose every tile was kept computes its last token's row alone."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    engine, token_ids = engine_of(checkpoint), prompt(2 * TILE_TOKENS + 3)
    cache = PrefixCache(engine.kv_format, tile_tokens=TILE_TOKENS, budget_bytes=1 << 30)
    earlier = cache.hold(token_ids[:num_kept], b"")
    cache.begin(earlier, is_alone=True)
    run = engine.begin(token_ids[:num_kept])
    while not run.is_over:
        (tile,) = engine.step([run])
        assert tile is not None
        earlier.keep(tile)
    cache.close(earlier)
    hold = cache.hold(token_ids, b"")
    warm = engine.begin(token_ids, prefix=hold.read, last_token_id=300)
    (tiles,) = tiles_of(engine, [warm])
    assert warm.num_cached_tokens == num_kept
    assert hasattr(warm, "hidden_ND") == (num_kept < len(token_ids))
    assert_plain(checkpoint, warm)
    (cold,) = tiles_of(engine, [engine.begin(token_ids)])
    computed = [tile for tile in tiles if tile.num_tokens]
    assert_same(computed, [tile for tile in cold if tile.first_token >= num_kept])


def test_prompts_that_share_steps_have_a_next_token_each_and_only_where_it_is_asked(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_config(dim=8 * 64))
    engine = engine_of(checkpoint, tile_tokens=40)
    asked = {(5, 0): 3, (9, 1): None, (1, 2): 319, (17, 3): 3}
    runs = [engine.begin(prompt(*which), last_token_id=last) for which, last in asked.items()]
    tiles_of(engine, runs)
    for run in runs:
        if run.last_token_id is None:
            assert run.next_token_id is None
        else:
            assert_plain(checkpoint, run)


@torch.inference_mode()
def test_behind_sparse_tiles_the_last_token_attends_to_all_of_them(tmp_path: Path) -> None:
    """Held against the layers by their definition, over the keys and values that were sent."""
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_config(num_layers=3, max_context=2048))
    engine = engine_of(checkpoint, tile_tokens=ROW_BLOCK)
    token_ids = prompt(5 * ROW_BLOCK + 9)
    plans = PromptPlans(SparsePlanner(checkpoint.config, FEW), None)
    run = engine.begin(token_ids, sparse=plans, last_token_id=11)
    (tiles,) = tiles_of(engine, [run])
    plain = engine.begin(token_ids, sparse=PromptPlans(plans._planner, None))
    assert_same(tiles, tiles_of(engine, [plain])[0])
    model, position = checkpoint.load(1), len(token_ids)
    x_1D = model.embedding.embed(torch.tensor([11]), 1)
    for index, layer in enumerate(model.blocks):
        sent = [tile for tile in tiles if tile.layer == index and tile.num_tokens]
        k_KNE, v_KNE = (torch.cat(parts, 1) for parts in zip(*(tile.tensors for tile in sent), strict=True))
        normed_1D = layer.attention_norm.by_chain([x_1D])
        cos_1E, sin_1E = engine._rope.range(position, position + 1)
        q_1HE, k_1KE, v_1KE = (each[0] for each in layer.attention.heads_by_chain(normed_1D, cos_1E, sin_1E))
        k_KSE, v_KSE = torch.cat([k_KNE, k_1KE.transpose(0, 1)], 1), torch.cat([v_KNE, v_1KE.transpose(0, 1)], 1)
        group = q_1HE.shape[1] // len(k_KSE)
        scores_HS = torch.einsum("he,hse->hs", q_1HE[0], k_KSE.repeat_interleave(group, 0)) * q_1HE.shape[2] ** -0.5
        out_HE = torch.einsum("hs,hse->he", scores_HS.softmax(1), v_KSE.repeat_interleave(group, 0))
        x_1D = x_1D + layer.attention.wo(out_HE.reshape(1, -1), (1,))
        x_1D = x_1D + layer.ffn(layer.ffn_norm(x_1D, 1), (1,))
    logits_V = model.output_table.logits(model.final_norm(x_1D, 1), (1,))[0]
    assert run.next_token_id is not None
    assert logits_V[run.next_token_id] >= logits_V.max() - 1e-4


def test_a_run_that_is_cancelled_has_none(tmp_path: Path) -> None:
    engine, flag = engine_of(tiny_checkpoint(tmp_path / "model")), CancelFlag()
    run = engine.begin(prompt(20), cancelled=flag, last_token_id=7)
    while not run.is_last_layer:
        engine.step([run])
    flag.set()
    assert engine.step([run]) == [None]
    assert run.next_token_id is None


def test_numbers_that_overflow_say_nothing(tmp_path: Path) -> None:
    """The tiles are finite, so the prompt is served; only the guess is left out."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    engine = engine_of(checkpoint)
    engine._model.final_norm.gains(1)[0].fill_(float("inf"))
    run = engine.begin(prompt(20), last_token_id=7)
    tiles_of(engine, [run])
    assert (run.error, run.next_token_id) == (None, None)
