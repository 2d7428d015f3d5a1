"""A prefill node that keeps what it has computed, through real nodes: what is computed, what moves, and the bits."""

import asyncio
from typing import Any

import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from prefill_node.node import PrefillNode
from tests.callers import Caller, pulled
from tests.gates import gate_before
from tests.nodes import TILE_TOKENS, decode, decode_node, prefill_node, spoilt_prefill, until_prefill_idle
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
OTHER_END = [*PROMPT[:100], *PROMPT[:30]]
WHOLE_OF_100 = 100 // TILE_TOKENS * TILE_TOKENS
CODECS = [common_pb2.CODEC_RAW, common_pb2.CODEC_INT8]
KEEPS = 64 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def counted(complete: pb.TransferComplete) -> tuple[int, int]:
    return complete.num_computed_tokens, complete.num_cached_tokens


def assert_nothing_in_use(node: PrefillNode) -> None:
    assert node.service._loop is not None
    node.service._loop.prefixes.check_integrity([])


@pytest.mark.parametrize("codec", CODECS)
async def test_what_was_computed_before_is_sent_and_not_computed(checkpoint: Checkpoint, codec: int) -> None:
    path, fields = str(checkpoint.path), {"codecs": [codec]}
    async with prefill_node(path) as fresh, prefill_node(path, prefix_cache_bytes=KEEPS) as node:
        right, _ = await pulled(fresh, PROMPT, "right", **fields)
        others, _ = await pulled(fresh, OTHER_END, "others", **fields)
        first, complete = await pulled(node, PROMPT, "first", **fields)
        assert counted(complete) == (150, 0)
        again, complete = await pulled(node, PROMPT, "again", **fields)
        assert counted(complete) == (0, 150)
        rest, complete = await pulled(node, OTHER_END, "rest", **fields)
        assert counted(complete) == (130 - WHOLE_OF_100, WHOLE_OF_100)
        tail, complete = await pulled(node, OTHER_END, "tail", first_token=TILE_TOKENS, **fields)
        assert counted(complete) == (0, 130)
        assert first == again == right
        assert rest == others
        assert tail == {place: others[place] for place in others if place[1] >= TILE_TOKENS}
        await until_prefill_idle(node)
        assert_nothing_in_use(node)


async def test_a_stream_from_behind_what_is_kept_brings_the_rest(checkpoint: Checkpoint) -> None:
    """The tiles between are computed, for those behind them to attend to, and not sent."""
    path = str(checkpoint.path)
    async with prefill_node(path) as fresh, prefill_node(path, prefix_cache_bytes=KEEPS) as node:
        right, _ = await pulled(fresh, PROMPT, "right")
        await pulled(node, PROMPT[: TILE_TOKENS + 1], "short")
        tail, complete = await pulled(node, PROMPT, "tail", first_token=3 * TILE_TOKENS)
        assert counted(complete) == (150 - TILE_TOKENS, TILE_TOKENS)
        assert tail == {place: right[place] for place in right if place[1] >= 3 * TILE_TOKENS}
        again, complete = await pulled(node, PROMPT, "again")
        assert counted(complete) == (0, 150)
        assert again == right


async def test_nothing_is_shared_between_salts_or_with_sparse_attention(checkpoint: Checkpoint) -> None:
    sparse = {"attention": common_pb2.ATTENTION_MODE_SPARSE}
    async with prefill_node(str(checkpoint.path), prefix_cache_bytes=KEEPS, sparse_dense_below_tokens=1) as node:
        cases: list[tuple[dict[str, Any], int]] = [
            ({}, 0),
            ({"cache_salt": b"a"}, 0),
            ({"cache_salt": b"b"}, 0),
            (sparse, 0),
            (sparse, 0),
            ({"cache_salt": b"a"}, 150),
            ({}, 150),
        ]
        for number, (fields, num_cached) in enumerate(cases):
            _, complete = await pulled(node, PROMPT, str(number), **fields)
            assert complete.num_cached_tokens == num_cached


async def test_a_broken_stream_of_kept_tiles_goes_on_where_it_was(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path, prefix_cache_bytes=KEEPS) as prefill:

        def breaks(attempt: int, number: int, data: bytes) -> list[bytes] | None:
            return None if (attempt, number) in ((2, 4), (3, 2)) else [data]

        async with (
            spoilt_prefill(prefill.address, breaks) as address,
            decode_node(path, [address]) as node,
        ):
            cold = await decode(node.address, PROMPT, num_chains=3, request_id="cold", max_draft_tokens=0)
            warm = await decode(node.address, PROMPT, num_chains=3, request_id="warm", max_draft_tokens=0)
    assert (cold.usage.num_prefill_tokens, cold.usage.num_prefill_cached_tokens) == (149, 0)
    assert (warm.usage.num_prefill_tokens, warm.usage.num_prefill_cached_tokens) == (149, 149)
    assert (warm.usage.num_kv_streams, warm.usage.kv_received_bytes) == (3, cold.usage.kv_received_bytes)
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)
    assert_greedy(checkpoint.load(), PROMPT, warm.token_ids, 3)


async def test_prompts_that_begin_alike_and_come_together_compute_it_once(checkpoint: Checkpoint) -> None:
    """Those that wait learn what has been computed meanwhile."""
    async with prefill_node(str(checkpoint.path), prefix_cache_bytes=KEEPS) as node:
        with gate_before(type(node.service._engine), "step") as gate:
            pulling = [asyncio.create_task(pulled(node, PROMPT, str(number))) for number in range(3)]
            await gate.until_reached()
            assert node.service._loop is not None
            async with asyncio.timeout(60):
                while len(node.service._loop._jobs) < 3:
                    await asyncio.sleep(0.01)
            gate.open()
            answers = await asyncio.gather(*pulling)
    assert sorted(counted(complete) for _, complete in answers) == [(0, 150), (0, 150), (150, 0)]
    assert answers[0][0] == answers[1][0] == answers[2][0]


async def test_a_prompt_that_is_given_up_in_mid_layer_leaves_nothing_in_use(checkpoint: Checkpoint) -> None:
    async with prefill_node(str(checkpoint.path), prefix_cache_bytes=KEEPS) as node:
        await pulled(node, PROMPT[:100], "first")
        with gate_before(type(node.service._engine), "step") as gate:
            caller = Caller(node, PROMPT)
            await gate.until_reached()
            caller.say(pb.PullKvRequest(give_up=pb.GiveUp()))
            await caller.read()
            caller.close()
            gate.open()
        _, complete = await pulled(node, PROMPT, "again")
        assert counted(complete) == (150 - WHOLE_OF_100, WHOLE_OF_100)
        await until_prefill_idle(node)
        assert_nothing_in_use(node)
