"""Halves of a prefill's layer in one call of the library, against the model's own modules.

Shapes: K kv heads, T tokens of a tile, E head dim.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from colm_kernels.native import CancelFlag, Cancelled, Variant, use_variant
from colm_kernels.prefill_layer import PrefillLayers, PrefillTile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.kv import KvFormat
from colm.model.one_call import step_layers
from colm.placement import CPU
from prefill_node.engine import PrefillEngine
from tests.library import VARIANTS, needs_library
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)
MODELS = {
    "three chains": {},
    "biases": {"bias": True},
    "eight query heads a kv head": {"chains": (8, 2), "num_kv_heads": 1},
    "one layer": {"num_layers": 1},
    "widths of no vector": {"dim": 8 * 20, "hidden_dim": 8 * 27},
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model", tiny_config(**request.param))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def tiles(
    checkpoint: Checkpoint, dtype: torch.dtype, num_tokens: int, tile_tokens: int, *, in_one_call: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """(k_KTE, v_KTE) of every tile."""
    kv_format = KvFormat.of(checkpoint.config, dtype)
    engine = PrefillEngine(checkpoint, kv_format, tile_tokens=tile_tokens, in_one_call=in_one_call)
    for tile in engine.run(np.random.default_rng(num_tokens).integers(0, 320, num_tokens)):
        yield tile.k_KTD.clone(), tile.v_KTD.clone()


@needs_library
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(num_tokens=st.integers(1, 70), tile_tokens=st.sampled_from([5, 16, 17, 64, 128]))
def test_one_call_gives_the_bits_of_the_models_own_modules(
    checkpoint: Checkpoint, dtype: torch.dtype, variant: Variant, num_tokens: int, tile_tokens: int
) -> None:
    with use_variant(variant):
        ours = list(tiles(checkpoint, dtype, num_tokens, tile_tokens, in_one_call=True))
        modules = list(tiles(checkpoint, dtype, num_tokens, tile_tokens, in_one_call=False))
    assert len(ours) == len(modules)
    for one_call, one_by_one in zip(ours, modules, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one_call, one_by_one, strict=True))


@needs_library
def test_tiles_that_the_library_takes_run_in_one_call(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list[int]()
    attend = PrefillLayers.attend

    def noted(layers: PrefillLayers, index: int, x_RD: Tensor, *rest: object) -> Tensor:
        rows.append(len(x_RD))
        return attend(layers, index, x_RD, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PrefillLayers, "attend", noted)
    list(tiles(tiny, torch.float32, 39, 20, in_one_call=True))
    assert rows == []
    list(tiles(tiny, torch.float32, 29, 13, in_one_call=True))
    assert rows == [13, 13, 3], "each tile of all layers but the last, whose output nobody reads"


def one_call_of(checkpoint: Checkpoint) -> PrefillLayers:
    config = checkpoint.config
    layers = step_layers(checkpoint.load(1, dtype=torch.float32), CPU)
    assert layers is not None
    heads = {"num_heads": config.chains[0], "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return PrefillLayers(layers, **heads, eps=config.norm_eps)


def tile_of(checkpoint: Checkpoint, *, first_token: int, cancelled: CancelFlag | None = None) -> PrefillTile:
    """A tile of a prompt of 3 tokens."""
    config = checkpoint.config
    k_KNE = torch.zeros(config.num_kv_heads, 3, config.head_dim)
    cos_RE = torch.ones(3, config.head_dim)
    return PrefillTile(cos_RE, 0 * cos_RE, k_KNE, k_KNE.clone(), first_token, cancelled)


@needs_library
def test_a_flag_that_is_set_ends_the_call(tiny: Checkpoint) -> None:
    one_call, cancelled = one_call_of(tiny), CancelFlag()
    x_RD, tile = torch.ones(3, tiny.config.chain_dims[0]), tile_of(tiny, first_token=0, cancelled=cancelled)
    with torch.inference_mode():
        normed_RD = one_call.write_keys_values(0, x_RD, tile, one_call.variant_for(3))
        cancelled.set()
        with pytest.raises(Cancelled):
            one_call.attend(0, x_RD, normed_RD, tile, one_call.variant_for(3))


@needs_library
@pytest.mark.parametrize("first_token", [-1, 1, 4])
def test_rows_that_the_keys_have_no_room_for_are_refused(tiny: Checkpoint, first_token: int) -> None:
    """Bug: they were written behind the prompt's keys, into whatever memory is there."""
    one_call = one_call_of(tiny)
    x_RD, tile = torch.ones(3, tiny.config.chain_dims[0]), tile_of(tiny, first_token=first_token)
    with torch.inference_mode(), pytest.raises(ValueError, match=f"3 rows from {first_token} on do not lie in the 3"):
        one_call.write_keys_values(0, x_RD, tile, one_call.variant_for(3))
