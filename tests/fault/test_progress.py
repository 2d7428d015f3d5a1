"""Progress of a prompt whose tiles take long."""

from pathlib import Path

import numpy as np
import pytest
import torch
from colm_kernels import native

from colm.wire.endpoint import open_channel
from colm.wire.security import Security
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from prefill_node import prefill_job
from tests.nodes import decode_node, decode_requests, prefill_node
from tests.tiny import tiny_checkpoint, tiny_config

NUM_TOKENS, NUM_LAYERS = 1 << 15, 2  # one tile, whose attention takes seconds


@pytest.mark.skipif(native.default_variant(torch.float32) == "torch", reason="PyTorch does not say how far it is")
async def test_a_request_hears_how_far_the_tile_is_that_is_being_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: progress stood still for as long as a tile took, which is seconds at a million keys."""
    monkeypatch.setattr(prefill_job, "PROGRESS_INTERVAL_S", 0.01)
    config = tiny_config(dim=8 * 64, num_layers=NUM_LAYERS, max_context=NUM_TOKENS + 16)  # heads of the native kernels
    path = str(tiny_checkpoint(tmp_path / "tiny", config).path)
    prompt, tokens_done = (np.arange(NUM_TOKENS + 1) % 320).tolist(), list[int]()
    async with (
        prefill_node(path, tile_tokens=NUM_TOKENS) as prefill,
        decode_node(path, [prefill.address], kv_cache_bytes=128 << 20) as node,
        open_channel(node.address, Security()) as channel,
    ):
        call = DecodeServiceStub(channel).Decode(iter(decode_requests(prompt)))
        async for response in call:
            if response.WhichOneof("event") == "prefill_progress":
                tokens_done.append(response.prefill_progress.num_tokens_done)
                if tokens_done[-1] > NUM_TOKENS // NUM_LAYERS:
                    break
        call.cancel()
    assert tokens_done == sorted(tokens_done)
    assert NUM_TOKENS // NUM_LAYERS < tokens_done[-1] < NUM_TOKENS, "inside the second layer's tile"
