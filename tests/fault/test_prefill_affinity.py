"""The rest of a prompt is asked of the prefill node that has computed its beginning, unless that is busy or gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import torch

from colm import prefix_routes
from colm.checkpoint import Checkpoint
from decode_node.node import DecodeNode
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S, gate_before
from tests.nodes import PAGE_TOKENS, decode, decode_node, prefill_node, until_prefill_idle
from tests.tiny import tiny_checkpoint

TILE_TOKENS = 2 * PAGE_TOKENS
NUM_SHARED, NUM_ASKED = 3 * TILE_TOKENS, 3 * TILE_TOKENS + 9
"""Tokens of a document in whole tiles, and of a prompt about it that a prefill node is asked for."""
DRAW = torch.Generator().manual_seed(4)
DOCUMENTS = [torch.randint(0, 320, (NUM_SHARED,), generator=DRAW).tolist() for _ in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def blocks_are_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_routes, "BLOCK_TOKENS", TILE_TOKENS)


@asynccontextmanager
async def three_nodes(
    checkpoint: Checkpoint, **options: object
) -> AsyncIterator[tuple[list[PrefillNode], DecodeNode, AsyncExitStack]]:
    """Two prefill nodes that keep what they computed, the first of them on a stack that a test may close, and a decode
    node that asks for everything, unless the options say otherwise."""
    path, kept = str(checkpoint.path), {"tile_tokens": TILE_TOKENS, "prefix_cache_bytes": 16 << 20}
    async with AsyncExitStack() as first, prefill_node(path, **kept) as other:  # type: ignore[arg-type]
        nodes = [await first.enter_async_context(prefill_node(path, **kept)), other]  # type: ignore[arg-type]
        chosen = {"prefill_tile_tokens": TILE_TOKENS} | options
        async with decode_node(path, [node.address for node in nodes], **chosen) as node:
            yield nodes, node, first


async def ask(node: DecodeNode, document: int, number: int) -> int:
    """Ask something new about a document; how many tokens the prefill node had kept."""
    prompt = [*DOCUMENTS[document], *range(number, number + NUM_ASKED + 1 - NUM_SHARED)]
    answer = await decode(node.address, prompt, request_id=f"{document}.{number}", max_new_tokens=1)
    return answer.usage.num_prefill_cached_tokens


def computed(nodes: list[PrefillNode]) -> list[int]:
    """Prompt tokens that each prefill node has computed."""
    return [int(node.metrics.get_sample_value("colm_prefill_tokens_total") or 0) for node in nodes]


@pytest.mark.parametrize("decode_keeps_bytes", [0, 16 << 20])
async def test_each_document_is_computed_once_by_one_of_two_nodes(
    checkpoint: Checkpoint, decode_keeps_bytes: int
) -> None:
    """Bug: the idle nodes took turns, so the second question about a document was computed anew by the other one."""
    async with three_nodes(checkpoint, prefix_cache_bytes=decode_keeps_bytes) as (nodes, node, _):
        for number in range(4):
            for document in range(3):
                num_kept = await ask(node, document, number)
                assert decode_keeps_bytes or num_kept == (NUM_SHARED if number else 0)
        for each in nodes:
            await until_prefill_idle(each)
        by_node = computed(nodes)
    num_rest = NUM_ASKED - NUM_SHARED
    assert sum(by_node) == 3 * (NUM_SHARED + 4 * num_rest)
    assert sorted(by_node) == [NUM_SHARED + 4 * num_rest, 2 * (NUM_SHARED + 4 * num_rest)], "new ones take turns"


async def test_a_document_whose_node_is_gone_is_computed_by_the_other_one_and_found_there(
    checkpoint: Checkpoint,
) -> None:
    async with three_nodes(checkpoint) as (nodes, node, first):
        assert [await ask(node, 0, number) for number in range(2)] == [0, NUM_SHARED]
        assert computed(nodes)[1] == 0
        await first.aclose()
        assert [await ask(node, 0, number) for number in range(2, 5)] == [0, NUM_SHARED, NUM_SHARED]


async def test_a_node_that_is_much_busier_than_the_other_is_left_alone(checkpoint: Checkpoint) -> None:
    """Seven questions at once: those that the node may have beyond the idle one's, then the others."""
    num_more = prefix_routes.MAX_MORE_REQUESTS + 1
    async with three_nodes(checkpoint) as (nodes, node, _):
        await ask(node, 0, 0)
        with gate_before(PrefillEngine, "step") as gate:
            asking = [asyncio.create_task(ask(node, 0, number)) for number in range(1, num_more + 3)]
            pool = node._fetcher._prefill_pool if node._fetcher is not None else None
            async with asyncio.timeout(LIMIT_S):
                while pool is None or sum(pool.loads().values()) < num_more + 2:
                    await asyncio.sleep(0.01)
            loads = [pool.loads()[each.address] for each in nodes]
            gate.open()
            await asyncio.gather(*asking)
    assert loads == [num_more, 2], "one went to the other node, and the next found its beginning there"
