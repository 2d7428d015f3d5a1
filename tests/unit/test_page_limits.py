"""A cache without one page is refused before anything starts; a page may be larger than a message."""

from pathlib import Path

import pytest

from cluster.lifecycle import up
from cluster.options import load_config
from colm.checkpoint import Checkpoint
from colm.errors import ConfigError
from colm.wire.endpoint import MAX_MESSAGE_BYTES
from tests.nodes import decode, decode_node, prefill_node
from tests.tiny import tiny_checkpoint

TOKEN_BYTES = 2 * 2 * 16 * 4  # one layer: keys and values, kv heads, head dim, float32
PAGE_TOKENS = MAX_MESSAGE_BYTES // TOKEN_BYTES + 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("page") / "tiny")


def bring_up(checkpoint: Checkpoint, state_dir: Path, **options: object) -> None:
    overrides = {"model.path": checkpoint.path, "model.dtype": "float32", "gateway.port": 0}
    up(load_config(None, overrides | options), state_dir, lambda _: pytest.fail("went on to start something"))


def test_up_refuses_a_cache_below_one_page_of_all_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Bug: only a replica found out, minutes later."""
    least = 2 * 64 * TOKEN_BYTES
    with pytest.raises(ConfigError, match=rf"decode\.kv_cache_bytes={least - 1} bytes .* all 2 layers, {least} bytes"):
        bring_up(checkpoint, tmp_path, **{"decode.kv_cache_bytes": least - 1})


async def test_a_page_larger_than_a_message_is_served(checkpoint: Checkpoint) -> None:
    """Pages are the decode node's alone: no message has to carry one."""
    path, prompt = str(checkpoint.path), list(range(3, 203))
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], page_tokens=PAGE_TOKENS, kv_cache_bytes=64 << 20) as node,
    ):
        answer = await decode(node.address, prompt, max_new_tokens=2)
    assert len(answer.token_ids) == 2
