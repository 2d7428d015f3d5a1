"""Both engines on a GPU against the oracle, from a prompt to logits, over messages of the stream.

Shapes: M pages of a request, V vocabulary.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from colm_kernels import tolerance

from bench.prefill.case import check_engine
from colm.checkpoint import Checkpoint
from colm.kv import KvFormat
from colm.model.presets import preset
from colm.wire.tile_codec import decode_message, decode_tile, encode_tile
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
PAGE_TOKENS, TILE_TOKENS, NUM_PAGES = 16, 24, 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-1b-16-16-air", "llama-3.2-1b-8-8-8-8-air"])
def test_keys_and_values_of_a_real_shape_are_the_definitions(name: str, dtype: torch.dtype) -> None:
    check_engine(preset(name), dtype, 256, 0, GPU)


@pytest.mark.parametrize("num_tokens", [1, 2, PAGE_TOKENS + 1, 100])
@pytest.mark.parametrize("num_chains", [1, 2, 3])
@torch.inference_mode()
def test_a_prompt_prefilled_there_is_answered_there(tmp_path: Path, num_tokens: int, num_chains: int) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(dim=8 * 64))
    kv_format = KvFormat.of(checkpoint.config, torch.float32)
    store = KvStore(KvLayout(kv_format, PAGE_TOKENS), NUM_PAGES, GPU)
    table_M = np.random.default_rng(0).permutation(NUM_PAGES)[:8].astype(np.int32)
    token_ids = np.random.default_rng(num_tokens).integers(0, 320, num_tokens)
    if num_tokens > 1:
        prefill = PrefillEngine(checkpoint, kv_format, tile_tokens=TILE_TOKENS, device=GPU)
        for tile in prefill.run(token_ids[:-1]):
            header, payload = decode_message(encode_tile(tile, transfer_id="t", epoch=1))
            store.write(table_M, decode_tile(header.tile, payload, kv_format))
    engine = DecodeEngine(checkpoint, store)
    logits_QV = engine.step(StepPlan((PlanRow((int(token_ids[-1]),), num_tokens - 1, num_chains, table_M),)))
    model = Checkpoint.open(checkpoint.path).load(dtype=torch.float64)
    exact_V = model(torch.from_numpy(token_ids).unsqueeze(0), num_chains)[0, -1]
    expected = tolerance.layers(
        exact_V, torch.float32, num_layers=checkpoint.config.num_layers, width=checkpoint.config.dim
    )
    expected.check(logits_QV[0].cpu())
