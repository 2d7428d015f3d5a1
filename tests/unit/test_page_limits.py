"""A page that no message carries, and a cache without one page, are refused before anything starts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.lifecycle import up
from cluster.options import load_config
from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.errors import ConfigError
from colm.kv import KvLayout
from colm.wire.endpoint import MAX_MESSAGE_BYTES
from colm.wire.security import Security
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import StaticPrefillPool
from prefill_node.node import PrefillNode, PrefillOptions
from tests.nodes import decode
from tests.tiny import tiny_checkpoint, tiny_config

TOKEN_BYTES = 2 * 2 * 16 * 4  # keys and values, kv heads, head dim, float32: of one layer
TOO_MANY = MAX_MESSAGE_BYTES // TOKEN_BYTES
REFUSAL = rf"model\.page_tokens={TOO_MANY} makes pages of {MAX_MESSAGE_BYTES} bytes a layer.* at most (\d+)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A context as long as the longest page, so that whole pages are sent."""
    return tiny_checkpoint(tmp_path_factory.mktemp("page") / "tiny", tiny_config(max_context=TOO_MANY + 1))


def bring_up(checkpoint: Checkpoint, state_dir: Path, **options: object) -> None:
    overrides = {"model.path": checkpoint.path, "model.dtype": "float32", "gateway.port": 0}
    up(load_config(None, overrides | options), state_dir, lambda _: pytest.fail("went on to start something"))


def prefill_node(checkpoint: Checkpoint, page_tokens: int) -> PrefillNode:
    options = PrefillOptions(
        model_path=str(checkpoint.path), dtype="float32", page_tokens=page_tokens, tile_tokens=page_tokens
    )
    return PrefillNode(options, Security())


def decode_node(checkpoint: Checkpoint, page_tokens: int, prefill: str = "127.0.0.1:1") -> DecodeNode:
    options = DecodeOptions(model_path=str(checkpoint.path), dtype="float32", page_tokens=page_tokens)
    return DecodeNode(options, Security(), StaticPrefillPool([prefill], MonotonicClock()))


def test_up_refuses_a_page_above_a_message(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Bug: the cluster came up, and failed every request."""
    with pytest.raises(ConfigError, match=REFUSAL):
        bring_up(checkpoint, tmp_path, **{"model.page_tokens": TOO_MANY, "prefill.tile_tokens": TOO_MANY})


def test_up_refuses_a_cache_below_one_page_of_all_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Bug: only a replica found out, minutes later."""
    least = 2 * 64 * TOKEN_BYTES
    with pytest.raises(ConfigError, match=rf"decode\.kv_cache_bytes={least - 1} bytes .* all 2 layers, {least} bytes"):
        bring_up(checkpoint, tmp_path, **{"decode.kv_cache_bytes": least - 1})


@pytest.mark.parametrize("node", [prefill_node, decode_node])
async def test_a_node_refuses_a_page_above_a_message(
    checkpoint: Checkpoint, node: Callable[[Checkpoint, int], PrefillNode | DecodeNode]
) -> None:
    with pytest.raises(ConfigError, match=REFUSAL):
        await node(checkpoint, TOO_MANY).start()


async def test_the_largest_page_that_is_offered_is_served(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError) as refusal:
        await prefill_node(checkpoint, TOO_MANY).start()
    page_tokens = int(str(refusal.value).rpartition(" ")[2])
    layout = KvLayout.of(checkpoint.config, dtype=torch.float32, page_tokens=page_tokens)
    assert MAX_MESSAGE_BYTES - (8 << 10) < page_tokens * layout.layer_token_bytes < MAX_MESSAGE_BYTES
    prompt = np.random.default_rng(0).integers(3, 300, page_tokens + 1).tolist()
    prefill = prefill_node(checkpoint, page_tokens)
    await prefill.start()
    server = decode_node(checkpoint, page_tokens, prefill.address)
    await server.start()
    try:
        answer = await decode(server.address, prompt, max_new_tokens=2)
    finally:
        await server.stop()
        await prefill.stop()
    assert len(answer.token_ids) == 2
    assert answer.usage.kv_received_bytes == page_tokens * layout.token_bytes
