"""What was found of a prompt is counted alike over gRPC, over HTTP and by both nodes' metrics."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from cluster.client_tokens import Clients
from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.events import Finished
from colm.request import ChatMessage
from colm.text.tokenizer import Tokenizer
from decode_node.node import DecodeNode
from prefill_node.node import PrefillNode
from tests.gateway import TakingTurns, gateway, http_gateway
from tests.nodes import PAGE_TOKENS, decode_node, prefill_node
from tests.tiny import tiny_checkpoint

TILE_TOKENS = 2 * PAGE_TOKENS
QUESTION = "what is the word that nobody says? " * 4
ANSWER = "the other one"


@asynccontextmanager
async def nodes(checkpoint: Checkpoint, *, decode_keeps: bool) -> AsyncIterator[tuple[PrefillNode, DecodeNode]]:
    """Both keep what they have, or the prefill node alone."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path, tile_tokens=TILE_TOKENS, prefix_cache_bytes=16 << 20) as prefill,
        decode_node(
            path,
            [prefill.address],
            prefill_tile_tokens=TILE_TOKENS,
            prefix_cache_bytes=(16 << 20) if decode_keeps else 0,
        ) as node,
    ):
        yield prefill, node


async def cached_over_http(checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode, *_: list[int]) -> list[int]:
    """`cached_tokens` of two turns of a conversation."""
    first: list[Any] = [{"role": "user", "content": QUESTION}]
    second = [*first, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "and now?"}]
    pool, seen = TakingTurns([node.address]), []
    async with (
        http_gateway(checkpoint.config, pool, tokenizer, clients=Clients("t")) as address,
        AsyncOpenAI(base_url=f"http://{address}/v1", api_key="t", max_retries=0) as client,
    ):
        for messages in (first, second):
            answer = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            seen.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    return seen


async def cached_over_grpc(checkpoint: Checkpoint, _: Tokenizer, node: DecodeNode, *turns: list[int]) -> list[int]:
    """What the usage of both turns adds up to."""
    seen = []
    async with (
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
        AsyncClient(address) as client,
    ):
        for token_ids in turns:
            end = [event async for event in client.generate(token_ids=token_ids, max_new_tokens=2)][-1]
            assert isinstance(end, Finished)
            usage = end.usage
            num_known = usage.num_cached_tokens + usage.num_prefill_tokens + usage.num_decode_prompt_tokens
            assert num_known == len(token_ids)
            seen.append(usage.num_cached_tokens + usage.num_prefill_cached_tokens)
    return seen


@pytest.mark.parametrize("decode_keeps", [True, False])
@pytest.mark.parametrize("cached", [cached_over_http, cached_over_grpc])
async def test_a_conversations_next_turn_finds_the_former_turns_prompt_and_every_count_says_so(
    tmp_path: Path, cached: Any, decode_keeps: bool
) -> None:
    """In whole blocks; what the decode node wrote itself, the former answer, is read again."""
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tokenizer=True)
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None
    history = [ChatMessage(role="user", content=QUESTION), ChatMessage(role="assistant", content=ANSWER)]
    first: list[int] = tokenizer.encode_prompt(document="", prompt=QUESTION, chat=True).tolist()
    second: list[int] = tokenizer.encode_prompt(document="", prompt="and now?", chat=True, history=history).tolist()
    assert second[: len(first)] == first
    num_shared = (len(first) - 1) // TILE_TOKENS * TILE_TOKENS
    num_brought = len(first) + len(second) - 2
    assert num_shared > 2 * TILE_TOKENS
    async with nodes(checkpoint, decode_keeps=decode_keeps) as (prefill, node):
        assert await cached(checkpoint, tokenizer, node, first, second) == [0, num_shared]

        def counted(of: DecodeNode | PrefillNode, name: str) -> float | None:
            return of.metrics.get_sample_value(f"{name}_total")

        looked_for = (num_brought, num_shared) if decode_keeps else (0, 0)
        assert counted(node, "colm_decode_prefix_query_tokens") == looked_for[0]
        assert counted(node, "colm_decode_prefix_hit_tokens") == looked_for[1]
        assert counted(prefill, "colm_prefix_cache_queried_tokens") == num_brought
        assert counted(prefill, "colm_prefix_cache_hit_tokens") == num_shared
        assert counted(prefill, "colm_prefill_tokens") == num_brought - num_shared
