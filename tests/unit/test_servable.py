"""The nodes serve every model with shared keys and values, and refuse all others."""

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from torch import Tensor

from colm.errors import UnsupportedModel
from colm.kv import KvFormat, require_shared_kv
from colm.model import ChainTransformer
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_checkpoint, tiny_config

REFUSAL = r"kv_sharing=False with chains=\(4, 4\) cannot be served.*colm slice"


def format_of(config) -> KvFormat:
    return KvFormat.of(config, torch.float32)


def test_nodes_refuse_a_model_without_kv_sharing_by_name(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "colm", tiny_config(chains=(4, 4), kv_sharing=False, num_kv_heads=4))
    with pytest.raises(UnsupportedModel, match=REFUSAL):
        PrefillEngine(checkpoint, format_of(checkpoint.config), tile_tokens=32)
    with pytest.raises(UnsupportedModel, match=REFUSAL):
        DecodeEngine(checkpoint, KvStore(KvLayout(format_of(checkpoint.config), 16), 8))


def test_one_chain_needs_no_kv_sharing():
    require_shared_kv(tiny_config(chains=(4,), kv_sharing=False))


@pytest.mark.parametrize("changes", [{"bias": True}, {"activation": "gelu"}], ids=["biases", "gelu"])
def test_prefill_of_every_form_gives_the_models_keys_and_values(tmp_path, changes):
    checkpoint = tiny_checkpoint(tmp_path / "colm", tiny_config(**changes))
    engine = PrefillEngine(checkpoint, format_of(checkpoint.config), tile_tokens=16)
    tiles = [tile.v_KTD.clone() for tile in engine.run(np.arange(16, dtype=np.int64))]
    exact = _values_of_first_layer(checkpoint.load(1, torch.float64))
    tolerance.layers(exact, torch.float32, num_layers=1, width=checkpoint.config.dim).check(tiles[0])
    assert len(tiles) == checkpoint.config.num_layers


@torch.inference_mode()
def _values_of_first_layer(model: ChainTransformer) -> Tensor:
    xs = model.embedding.embed_by_chain(torch.arange(16), 1)
    layer = model.blocks[0]
    _, v_RKD = layer.attention.keys_values(layer.attention_norm.by_chain(xs)[0])
    return v_RKD.transpose(0, 1)
