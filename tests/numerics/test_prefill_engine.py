"""The prefill engine's keys and values against the oracle's own layers.

Shapes: N prompt tokens, T tokens of a tile, K kv heads, E head dim.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint, prefill_tensor_names
from colm.errors import InvalidRequest
from colm.kv import KvFormat
from colm.model import ChainTransformer
from colm.model.config import RopeScaling
from colm.model.transformer import parameter_shapes
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

TILE_TOKENS = 8
LENGTHS = [1, TILE_TOKENS - 1, TILE_TOKENS, TILE_TOKENS + 1, 2 * TILE_TOKENS, 31]

MODELS: dict[str, dict[str, Any]] = {
    "small heads": {},
    "heads of the native kernel": {"dim": 8 * 64},
    "one query head a kv head": {"chains": (2, 2)},
    "eight query heads a kv head": {"chains": (8, 2), "num_kv_heads": 1},
    "stretched rope": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_context=32)},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=8.0, original_max_context=32, beta_fast=4.0)},
    "tied": {"tie_embeddings": True},
    "one layer": {"num_layers": 1},
    "biases": {"bias": True},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "model", tiny_config(**request.param))


def engine_of(
    checkpoint: Checkpoint, tile_tokens: int = TILE_TOKENS, dtype: torch.dtype = torch.float32
) -> PrefillEngine:
    return PrefillEngine(checkpoint, KvFormat.of(checkpoint.config, dtype), tile_tokens=tile_tokens)


def prompt(num_tokens: int, seed: int = 5) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 320, num_tokens)


def computed(engine: PrefillEngine, token_ids: NDArray[np.int64]) -> list[tuple[Tensor, Tensor]]:
    """(k_KNE, v_KNE) of each layer, put together from the tiles."""
    layers: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(engine.kv_format.num_layers)]
    for tile in engine.run(token_ids):
        keys, values = layers[tile.layer]
        keys.append(tile.k_KTD.clone())
        values.append(tile.v_KTD.clone())
    return [(torch.cat(keys, dim=1), torch.cat(values, dim=1)) for keys, values in layers]


@torch.inference_mode()
def oracles(model: ChainTransformer, token_ids: NDArray[np.int64]) -> list[tuple[Tensor, Tensor]]:
    """(k_KNE, v_KNE) of each layer by the model's own layers, whole sequences at a time."""
    return [(k_KNE, v_KNE) for _, k_KNE, v_KNE in model.chain1_heads(torch.from_numpy(token_ids))]


def assert_equals_oracle(engine: PrefillEngine, checkpoint: Checkpoint, token_ids: NDArray[np.int64]) -> None:
    dtype, width = engine.kv_format.dtype, checkpoint.config.dim
    reference = oracles(checkpoint.load(1, dtype=dtype).double(), token_ids)
    for layer, (ours, exact) in enumerate(zip(computed(engine, token_ids), reference, strict=True)):
        for result, wanted in zip(ours, exact, strict=True):
            tolerance.layers(wanted, dtype, num_layers=layer + 1, width=width).check(result)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_keys_and_values_are_the_oracles(checkpoint: Checkpoint, num_tokens: int) -> None:
    assert_equals_oracle(engine_of(checkpoint), checkpoint, prompt(num_tokens))


@pytest.mark.parametrize("tile_tokens", [1, 5, 12, 256])
def test_keys_and_values_do_not_depend_on_the_tile(tmp_path: Path, tile_tokens: int) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    assert_equals_oracle(engine_of(checkpoint, tile_tokens), checkpoint, prompt(37))


def test_keys_and_values_in_bfloat16_are_the_oracles_in_bfloat16(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_config(dim=8 * 64))
    assert_equals_oracle(engine_of(checkpoint, dtype=torch.bfloat16), checkpoint, prompt(31))


def test_the_longest_prompt_of_the_model_is_computed(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_config(max_context=29))
    assert_equals_oracle(engine_of(checkpoint), checkpoint, prompt(29))


def test_one_engine_serves_one_prompt_after_the_other(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    engine = engine_of(checkpoint)
    for seed, num_tokens in ((1, 21), (2, 3), (3, 30)):
        assert_equals_oracle(engine, checkpoint, prompt(num_tokens, seed))


def test_a_run_that_was_dropped_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    engine = engine_of(checkpoint)
    next(engine.run(prompt(30, seed=1)))
    assert_equals_oracle(engine, checkpoint, prompt(19, seed=2))


def test_whole_tiles_do_not_change_with_what_follows_them(tmp_path: Path) -> None:
    engine = engine_of(tiny_checkpoint(tmp_path / "model"))
    longer = prompt(3 * TILE_TOKENS + 3)
    short, long = computed(engine, longer[: 2 * TILE_TOKENS]), computed(engine, longer)
    for (short_k, short_v), (long_k, long_v) in zip(short, long, strict=True):
        assert torch.equal(short_k, long_k[:, : 2 * TILE_TOKENS])
        assert torch.equal(short_v, long_v[:, : 2 * TILE_TOKENS])


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_tiles_come_layer_by_layer_in_token_order_without_gaps(tmp_path: Path, num_tokens: int) -> None:
    engine = engine_of(tiny_checkpoint(tmp_path / "model"))
    starts = range(0, num_tokens, TILE_TOKENS)
    expected = [(layer, start, min(TILE_TOKENS, num_tokens - start)) for layer in range(2) for start in starts]
    assert [(tile.layer, tile.first_token, tile.num_tokens) for tile in engine.run(prompt(num_tokens))] == expected


def test_a_tile_comes_before_the_work_behind_it(tmp_path: Path) -> None:
    """The first tile needs no attention: without the rest of the layer it still comes, and the next does not."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    kv_format = KvFormat.of(checkpoint.config, torch.float32)
    engine = PrefillEngine(checkpoint, kv_format, tile_tokens=TILE_TOKENS, in_one_call=False)
    engine._model.layers[0].ffn.down.chain1 = torch.nn.Parameter(torch.empty(0, 0))
    tiles = engine.run(prompt(20))
    next(tiles)
    with pytest.raises(ValueError, match="x_RI has"):
        next(tiles)


def test_a_prefill_engine_holds_all_of_chain_1_and_nothing_else(checkpoint: Checkpoint) -> None:
    """The last layer's end and the head say a provisional first token; a further chain would be memory for nothing."""
    parameters = dict(engine_of(checkpoint)._model.named_parameters())
    assert all(not parameter.is_meta for parameter in parameters.values())
    assert set(parameters) == set(parameter_shapes(checkpoint.config, 1))
    assert prefill_tensor_names(checkpoint.config) < set(parameters)


@pytest.mark.parametrize(
    ("token_ids", "field", "value"),
    [
        (np.zeros(0, dtype=np.int64), "num_tokens", "0"),
        (np.zeros(513, dtype=np.int64), "num_tokens", "513"),
        (np.array([1, 320, 2]), "token_ids", "320"),
        (np.array([1, -1, 2]), "token_ids", "-1"),
    ],
    ids=["empty", "beyond the context", "beyond the vocabulary", "negative"],
)
def test_a_prompt_out_of_range_is_refused_before_any_work(
    tmp_path: Path, token_ids: NDArray[np.int64], field: str, value: str
) -> None:
    engine = engine_of(tiny_checkpoint(tmp_path / "model"))
    with pytest.raises(InvalidRequest) as refusal:
        next(engine.run(token_ids))
    assert (refusal.value.field, refusal.value.value) == (field, value)


@pytest.mark.parametrize("tile_tokens", [0, -4])
def test_a_tile_without_tokens_is_refused(tmp_path: Path, tile_tokens: int) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match=f"tile_tokens={tile_tokens} must be at least 1"):
        engine_of(checkpoint, tile_tokens)
