"""Progress of a prompt whose tiles take long."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colm.wire.endpoint import open_channel
from colm.wire.security import Security
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from prefill_node import engine as engine_module
from prefill_node import job_stream
from tests.gates import LIMIT_S
from tests.library import needs_library
from tests.nodes import decode_node, decode_requests, prefill_node
from tests.tiny import tiny_checkpoint, tiny_config

NUM_TOKENS, NUM_LAYERS = 2000, 2  # one tile


@needs_library  # PyTorch does not say how far it is
async def test_a_request_hears_how_far_the_tile_is_that_is_being_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: progress stood still for as long as a tile took, which is seconds at a million keys."""
    monkeypatch.setattr(job_stream, "PROGRESS_INTERVAL_S", 0.01)
    config = tiny_config(dim=8 * 64, num_layers=NUM_LAYERS, max_context=NUM_TOKENS + 16)  # heads of the native kernels
    path = str(tiny_checkpoint(tmp_path / "tiny", config).path)
    attention, is_heard = engine_module.prefill_attention, threading.Event()

    def held(q_THE: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The first layer's, until the client has heard of it; the second layer's tile can come only then."""
        result = attention(q_THE, *args, **kwargs)
        if len(q_THE) == NUM_TOKENS:
            assert is_heard.wait(LIMIT_S)
        return result

    monkeypatch.setattr(engine_module, "prefill_attention", held)
    tokens_done: list[int] = []
    async with (
        prefill_node(path, tile_tokens=NUM_TOKENS) as prefill,
        decode_node(path, [prefill.address]) as node,
        open_channel(node.address, Security()) as channel,
    ):
        requests = decode_requests((np.arange(NUM_TOKENS + 1) % 320).tolist())
        async for response in DecodeServiceStub(channel).Decode(iter(requests), timeout=LIMIT_S):
            if response.WhichOneof("event") == "prefill_progress":
                tokens_done.append(response.prefill_progress.num_tokens_done)
                if tokens_done[-1] > NUM_TOKENS // NUM_LAYERS:
                    is_heard.set()
    assert tokens_done == sorted(tokens_done)
    assert any(NUM_TOKENS // NUM_LAYERS < done < NUM_TOKENS for done in tokens_done), "inside the second layer's tile"
    assert tokens_done[-1] == NUM_TOKENS
