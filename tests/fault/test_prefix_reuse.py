"""Prompts that begin alike share pages on a decode node: what is brought and computed, whose, and with which tokens."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.kv import KvFormat
from colm.retry import RetryPolicy
from colm.sampling import SamplingParams
from colm.wire.tile_codec import decode_message
from colm.wire.v1 import common_pb2
from decode_node.node import DecodeNode
from decode_node.prefill_pool import StaticPrefillPool
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S
from tests.nodes import PAGE_TOKENS, Answer, decode, decode_node, pages_bytes, prefill_node, spoilt_prefill, until_idle
from tests.tiny import tiny_checkpoint

TILE_TOKENS = 2 * PAGE_TOKENS
"""So that a tile is a block."""
CACHED = {"prefix_cache_bytes": 16 << 20}
DOCUMENT = torch.randint(0, 320, (3 * TILE_TOKENS + 5,), generator=torch.Generator().manual_seed(1)).tolist()
ONE, OTHER = [*DOCUMENT, 7, 8, 9], [*DOCUMENT, 17, 18, 19, 20, 21]
NUM_SHARED = 3 * TILE_TOKENS
SAMPLED = SamplingParams(temperature=0.8, top_k=50, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@asynccontextmanager
async def nodes(checkpoint: Checkpoint, **options: object) -> AsyncIterator[tuple[PrefillNode, DecodeNode]]:
    """A prefill node, and a decode node that has asked it once, so that it knows the tiles."""
    path = str(checkpoint.path)
    async with prefill_node(path, tile_tokens=TILE_TOKENS) as prefill:
        chosen = {"prefill_tile_tokens": TILE_TOKENS} | CACHED | options
        async with decode_node(path, [prefill.address], **chosen) as node:
            yield prefill, node


def token_bytes(checkpoint: Checkpoint) -> int:
    return KvFormat.of(checkpoint.config, torch.float32).token_bytes


async def test_a_second_question_about_a_document_is_brought_from_its_end_on(checkpoint: Checkpoint) -> None:
    async with nodes(checkpoint) as (_, node):
        first, second = await decode(node.address, ONE), await decode(node.address, OTHER, request_id="s")
    assert (first.usage.num_cached_tokens, second.usage.num_cached_tokens) == (0, NUM_SHARED)
    assert first.usage.kv_received_bytes == (len(ONE) - 1) * token_bytes(checkpoint)
    assert second.usage.kv_received_bytes == (len(OTHER) - 1 - NUM_SHARED) * token_bytes(checkpoint)


@pytest.mark.parametrize("kv_cache_dtype", ["model", "int8"])
async def test_the_same_prompt_again_asks_no_prefill_node(checkpoint: Checkpoint, kv_cache_dtype: str) -> None:
    async with nodes(checkpoint, kv_cache_dtype=kv_cache_dtype) as (_, node):
        first, second = await decode(node.address, ONE), await decode(node.address, ONE, request_id="s")
        assert node.owner.prefix.num_query_tokens == 2 * (len(ONE) - 1)
        assert node.owner.prefix.num_hit_tokens == len(ONE) - 1
    usage = second.usage
    assert (usage.num_cached_tokens, usage.num_prefill_tokens, usage.num_decode_prompt_tokens) == (len(ONE) - 1, 0, 1)
    assert (usage.kv_received_bytes, usage.num_kv_streams) == (0, 0)
    assert (first.token_ids, first.logprobs) == (second.token_ids, second.logprobs)


@pytest.mark.parametrize("max_draft_tokens", [0, 4])
@pytest.mark.parametrize("sampling", [SamplingParams(ignore_eos=True), SAMPLED], ids=["greedy", "sampled"])
async def test_tokens_are_those_without_reuse_at_every_scale(
    checkpoint: Checkpoint, sampling: SamplingParams, max_draft_tokens: int
) -> None:
    """Bit for bit, whatever was asked before, at whichever scale, and how far the answer went into its pages."""
    num_chains = checkpoint.config.num_chains
    asked = [(prompt, scale) for prompt in (ONE, OTHER, ONE) for scale in range(1, num_chains + 1)]

    async def answers(node: DecodeNode) -> list[Answer]:
        return [
            await decode(
                node.address,
                prompt,
                request_id=str(number),
                num_chains=scale,
                max_new_tokens=2 * PAGE_TOKENS,
                sampling=sampling,
                max_draft_tokens=max_draft_tokens,
            )
            for number, (prompt, scale) in enumerate(asked)
        ]

    async with nodes(checkpoint, prefix_cache_bytes=0) as (_, plain), nodes(checkpoint) as (_, node):
        expected, found = await answers(plain), await answers(node)
        assert node.page_line.cache.num_available == node.page_line.pool.num_pages
    assert [(each.token_ids, each.logprobs) for each in found] == [(e.token_ids, e.logprobs) for e in expected]
    assert [answer.usage.num_cached_tokens > 0 for answer in found] == [False] + [True] * (len(asked) - 1)


async def test_several_that_come_at_once_have_one_prefill(checkpoint: Checkpoint) -> None:
    async with nodes(checkpoint, prefix_cache_bytes=0) as (_, plain):
        seeds = [SamplingParams(temperature=0.8, seed=seed, ignore_eos=True) for seed in range(4)]
        expected = [await decode(plain.address, ONE, request_id=str(s.seed), sampling=s) for s in seeds]
    async with nodes(checkpoint) as (_, node):
        found = await asyncio.gather(*(decode(node.address, ONE, request_id=str(s.seed), sampling=s) for s in seeds))
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert sum(answer.usage.num_kv_streams for answer in found) == 1
    assert sum(answer.usage.num_prefill_tokens for answer in found) == len(ONE) - 1
    assert sum(answer.usage.kv_received_bytes for answer in found) == (len(ONE) - 1) * token_bytes(checkpoint)


async def test_another_question_waits_for_the_document_that_is_on_its_way(checkpoint: Checkpoint) -> None:
    async with nodes(checkpoint) as (_, node):
        first, second = await asyncio.gather(decode(node.address, ONE), decode(node.address, OTHER, request_id="s"))
    assert sorted(answer.usage.num_cached_tokens for answer in (first, second)) == [0, NUM_SHARED]


class Counted:
    """Between the nodes: counts tiles."""

    def __init__(self) -> None:
        self.num_tiles = 0

    def __call__(self, attempt: int, number: int, message: bytes) -> list[bytes] | None:  # noqa: ARG002
        self.num_tiles += decode_message(message)[0].WhichOneof("event") == "tile"
        return [message]


async def test_a_prefill_goes_on_for_those_who_share_it_when_the_first_has_gone(checkpoint: Checkpoint) -> None:
    path, seen = str(checkpoint.path), Counted()
    async with (
        prefill_node(path, tile_tokens=TILE_TOKENS) as prefill,
        spoilt_prefill(prefill.address, seen) as between,
        decode_node(path, [between], prefill_tile_tokens=TILE_TOKENS, **CACHED) as node,
    ):
        expected = await decode(node.address, ONE, request_id="e", cache_salt=b"other")
        num_tiles, seen.num_tiles = seen.num_tiles, 0
        first = asyncio.create_task(decode(node.address, ONE, request_id="f"))
        second = asyncio.create_task(decode(node.address, ONE, request_id="s"))
        async with asyncio.timeout(LIMIT_S):
            while len(node.owner._requests) < 2 or not node.owner._prefills._running:
                await asyncio.sleep(0)
        leader = next(iter(node.owner._prefills._running)).owner
        (first if leader == "f" else second).cancel()
        follower = await (second if leader == "f" else first)
        assert follower.token_ids == expected.token_ids
        assert seen.num_tiles == num_tiles, "the prompt was brought once"
        await until_idle(node)


async def test_a_prefill_that_nobody_wants_is_given_up_and_begun_anew(checkpoint: Checkpoint) -> None:
    async with nodes(checkpoint) as (_, node):
        for number in range(3):
            gone = asyncio.create_task(decode(node.address, ONE, request_id=f"g{number}"))
            async with asyncio.timeout(LIMIT_S):
                while not node.owner._prefills._running and not gone.done():
                    await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait([gone])
            node.page_line.cache.check_integrity()
        answer = await decode(node.address, ONE)
        await until_idle(node)
        node.page_line.cache.check_integrity()
    async with nodes(checkpoint, prefix_cache_bytes=0) as (_, plain):
        assert answer.token_ids == (await decode(plain.address, ONE)).token_ids


async def test_a_prefill_that_fails_fails_all_who_share_it_and_leaves_nothing(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with decode_node(path, ["127.0.0.1:1"], prefill_tile_tokens=TILE_TOKENS, **CACHED) as node:
        assert node._fetcher is not None
        node._fetcher._retry = RetryPolicy(max_attempts=1, first_pause_s=0.0, last_pause_s=0.0)
        ends = await asyncio.gather(
            *(decode(node.address, ONE, request_id=str(number)) for number in range(3)), return_exceptions=True
        )
        assert all(isinstance(end, grpc.aio.AioRpcError) for end in ends)
        await until_idle(node)
        assert node.page_line.pool.num_idle == 0
        node.page_line.cache.check_integrity()


async def test_a_request_that_is_refused_with_its_pages_leaves_no_block_that_nobody_brings(
    checkpoint: Checkpoint,
) -> None:
    async with nodes(checkpoint) as (_, node):
        ends_at_once = SamplingParams(stop_token_ids=(5,))
        with pytest.raises(grpc.aio.AioRpcError, match="the answer ended after 1"):
            await decode(node.address, ONE, request_id="r", sampling=ends_at_once, made_token_ids=[5, 6])
        assert (await decode(node.address, ONE)).usage.num_cached_tokens == 0


async def test_clients_share_nothing(checkpoint: Checkpoint) -> None:
    async with nodes(checkpoint) as (_, node):
        for number, salt in enumerate([b"", b"one", b"two"]):
            answer = await decode(node.address, ONE, request_id=str(number), cache_salt=salt)
            assert answer.usage.num_cached_tokens == 0
        again = await decode(node.address, ONE, request_id="again", cache_salt=b"one")
        assert again.usage.num_cached_tokens == len(ONE) - 1


async def test_codecs_and_kinds_of_attention_share_nothing(checkpoint: Checkpoint) -> None:
    """Their keys and values differ: int8 is rounded, and above layer 0 sparse attention is another sum."""
    others: Sequence[dict[str, int]] = [
        {},
        {"kv_codec": common_pb2.CODEC_INT8},
        {"attention": common_pb2.ATTENTION_MODE_SPARSE},
    ]
    async with nodes(checkpoint) as (_, node):
        for round_number, num_cached in enumerate([0, len(ONE) - 1]):
            for number, options in enumerate(others):
                answer = await decode(node.address, ONE, request_id=f"{round_number}{number}", **options)
                assert answer.usage.num_cached_tokens == num_cached


async def test_a_node_that_learns_of_other_tiles_keeps_what_it_cuts_by_them(checkpoint: Checkpoint) -> None:
    async with nodes(checkpoint, prefill_tile_tokens=512) as (_, node):
        first = await decode(node.address, ONE, request_id="1")
        second = await decode(node.address, OTHER, request_id="2")
        third = await decode(node.address, ONE, request_id="3")
    assert [a.usage.num_cached_tokens for a in (first, second, third)] == [0, 0, NUM_SHARED]


async def test_a_prefill_node_of_other_tiles_refuses_a_rest_and_the_next_try_asks_for_all(
    checkpoint: Checkpoint,
) -> None:
    path = str(checkpoint.path)
    async with nodes(checkpoint) as (_, node), prefill_node(path, tile_tokens=5 * PAGE_TOKENS) as other:
        await decode(node.address, ONE, request_id="1")
        assert node._fetcher is not None
        node._fetcher._prefill_pool = StaticPrefillPool([other.address], MonotonicClock())
        with pytest.raises(grpc.aio.AioRpcError, match="computes other tiles"):
            await decode(node.address, OTHER, request_id="2")
        answer = await decode(node.address, OTHER, request_id="3")
        assert answer.usage.num_cached_tokens == 0


async def test_what_is_cached_gives_way_to_a_request_that_needs_all_pages(checkpoint: Checkpoint) -> None:
    num_pages = -(-(len(ONE) + 8) // PAGE_TOKENS)
    async with nodes(checkpoint, kv_cache_bytes=pages_bytes(checkpoint.config, num_pages)) as (_, node):
        for number, prompt in enumerate([ONE, list(reversed(ONE)), ONE]):
            await decode(node.address, prompt, request_id=str(number), only_if_room=True)
            await until_idle(node)
            node.page_line.cache.check_integrity()
        assert node.page_line.cache.num_evicted_pages


async def test_random_mixes_in_few_pages_have_the_tokens_of_a_node_without_reuse(checkpoint: Checkpoint) -> None:
    """Documents that push out each other, scales, drafts, samples, and requests that end in the middle."""
    draw = random.Random(5)
    documents = [torch.randint(0, 320, (3 * TILE_TOKENS,)).tolist() for _ in range(3)]
    asks: list[dict[str, Any]] = [
        {
            "token_ids": [
                *draw.choice(documents)[: draw.choice([1, 2, 3]) * TILE_TOKENS],
                *range(draw.choice([1, 9, 20])),
            ],
            "request_id": str(number),
            "num_chains": draw.randint(1, checkpoint.config.num_chains),
            "max_new_tokens": draw.choice([1, 7, 20]),
            "sampling": draw.choice([SamplingParams(ignore_eos=True), SAMPLED]),
            "max_draft_tokens": draw.choice([0, 3]),
        }
        for number in range(16)
    ]
    few = pages_bytes(checkpoint.config, 20)
    async with (
        nodes(checkpoint, prefix_cache_bytes=0) as (_, plain),
        nodes(checkpoint, kv_cache_bytes=few) as (_, node),
    ):
        expected = [(await decode(plain.address, **ask)).token_ids for ask in asks]
        turns = asyncio.Semaphore(5)

        async def ask_once(number: int) -> tuple[int, ...] | None:
            async with turns:
                asking = asyncio.create_task(decode(node.address, **asks[number]))
                if number % 4 == 0:
                    await asyncio.wait([asking], timeout=draw.choice([0, 0.01, 0.05]))
                    asking.cancel()
                await asyncio.wait([asking])
                node.page_line.cache.check_integrity()
                return None if asking.cancelled() else asking.result().token_ids

        found = await asyncio.gather(*map(ask_once, range(len(asks))))
        await until_idle(node)
        assert node.page_line.cache.num_evicted_pages
        assert node.owner.prefix.num_hit_tokens
    assert [each for each, ids in zip(expected, found, strict=True) if ids not in (None, each)] == []
    assert sum(ids is not None for ids in found) >= 12, "those that nobody cancelled"
