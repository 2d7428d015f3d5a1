"""A caller that holds a prefix is sent the rest alone, with the bits of a stream that brings everything."""

import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.errors import InvalidRequest
from colm.wire.v1 import common_pb2
from tests.callers import Caller, pulled
from tests.nodes import TILE_TOKENS, prefill_node
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (70,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("codec", [common_pb2.CODEC_RAW, common_pb2.CODEC_INT8])
async def test_what_follows_a_token_is_sent_as_in_a_stream_of_everything(checkpoint: Checkpoint, codec: int) -> None:
    async with prefill_node(str(checkpoint.path)) as node:
        whole, _ = await pulled(node, PROMPT, "whole", codecs=[codec])
        for first_token in (TILE_TOKENS, 2 * TILE_TOKENS):
            rest, complete = await pulled(node, PROMPT, str(first_token), codecs=[codec], first_token=first_token)
            assert rest == {place: whole[place] for place in whole if place[1] >= first_token}
            assert complete.num_tiles == len(rest)
            assert complete.num_computed_tokens + complete.num_cached_tokens == len(PROMPT)


REFUSED = {
    "part of a tile": ({"first_token": TILE_TOKENS - 1}, "first_token"),
    "all tiles": ({"first_token": 3 * TILE_TOKENS}, "first_token"),
    "a plan": ({"first_token": TILE_TOKENS, "attention": common_pb2.ATTENTION_MODE_SPARSE}, "first_token"),
    "a long salt": ({"cache_salt": bytes(65)}, "cache_salt"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_a_node_cannot_leave_out_is_refused_by_name(checkpoint: Checkpoint, case: str) -> None:
    fields, named = REFUSED[case]
    async with prefill_node(str(checkpoint.path)) as node:
        caller = Caller(node, PROMPT, **fields)
        error = await caller.error()
        caller.close()
    assert isinstance(error, InvalidRequest)
    assert error.field == named


async def test_a_node_says_what_a_first_token_is_a_multiple_of(checkpoint: Checkpoint) -> None:
    async with prefill_node(str(checkpoint.path)) as node:
        caller = Caller(node, PROMPT)
        (started,) = await caller.read(1)
        caller.close()
    assert started.started.tile_tokens == TILE_TOKENS
