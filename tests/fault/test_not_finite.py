"""A model whose numbers overflow ends a request with a typed error, at the tile where it happens."""

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from colm.checkpoint import Checkpoint, save
from colm.errors import NotFinite
from colm.kv import KvFormat, KvTile
from colm.kv_position import KV_START
from colm.request import KV_CODECS, KvCodec
from colm.wire.status import error_of
from colm.wire.v1 import common_pb2
from prefill_node.encoded_tile import TileEncoder
from prefill_node.engine import PrefillEngine
from tests.gates import LIMIT_S
from tests.nodes import decode, decode_node, prefill_node
from tests.tiny import random_tensors, tiny_config

CONFIG = tiny_config(num_layers=3)
PROMPT = list(range(5, 105))


@pytest.fixture
def overflowing(tmp_path: Path) -> Checkpoint:
    """Finite weights, of which layer 0's last product is infinite in float32."""
    tensors = random_tensors(CONFIG)
    tensors["layers.0.ffn.down.chain1"] *= 1e38
    return save(tmp_path / "model", CONFIG, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("token", [0, 16, 30])
@pytest.mark.parametrize("codec", KV_CODECS)
def test_a_tile_that_is_not_finite_is_not_sent(codec: KvCodec, kind: str, value: float, token: int) -> None:
    kv_format = KvFormat.of(CONFIG, torch.bfloat16)
    encoder = TileEncoder(transfer_id="t", num_tokens=100, kv_format=kv_format, codec=codec)
    k_KTD, v_KTD = torch.randn(2, kv_format.num_kv_heads, 31, kv_format.head_dim).bfloat16()
    tile = KvTile(1, 62, k_KTD, v_KTD)
    assert encoder.encode(tile, epoch=1, since=KV_START)
    (k_KTD if kind == "keys" else v_KTD)[-1, token, 3] = value
    with pytest.raises(NotFinite, match="layer 1, tokens 62 to 92"):
        encoder.encode(tile, epoch=1, since=KV_START)


@pytest.mark.parametrize("codec", [common_pb2.CODEC_RAW, common_pb2.CODEC_INT8])
async def test_a_request_ends_at_the_tile_and_is_not_tried_again(
    overflowing: Checkpoint, codec: common_pb2.Codec
) -> None:
    """Bug: NaN keys were sent to their end, and the answer was an error without a cause."""
    path = str(overflowing.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(node.address, PROMPT, kv_codec=codec)
        error = error_of(caught.value, "decode node")
        assert type(error) is NotFinite
        assert "layer 1, tokens 0 to 30" in str(error)
        assert "attempts" not in str(error)
        async with asyncio.timeout(LIMIT_S):
            while prefill.service.load.num_active or prefill.service.load.num_queued:
                await asyncio.sleep(0.01)


def test_finite_hidden_states_are_sent_to_the_last_tile_before(overflowing: Checkpoint) -> None:
    kv_format = KvFormat.of(CONFIG, torch.float32)
    encoder = TileEncoder(transfer_id="t", num_tokens=len(PROMPT), kv_format=kv_format)
    tiles = PrefillEngine(overflowing, kv_format, tile_tokens=31).run(np.array(PROMPT))
    for first_token in (0, 31, 62, 93):
        (encoded,) = encoder.encode(next(tiles), epoch=1, since=KV_START)
        assert encoded.begin == (0, first_token)
    spoilt = next(tiles)
    with pytest.raises(NotFinite, match="layer 1, tokens 0 to 30"):
        encoder.encode(spoilt, epoch=1, since=KV_START)
