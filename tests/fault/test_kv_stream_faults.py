"""A KV stream that goes wrong: the answer is either the right one or one clear error, and nothing stays held."""

import time
from pathlib import Path

import grpc
import pytest
import torch

from colm.checkpoint import Checkpoint, save
from colm.wire.tile_codec import decode_message
from colm.wire.v1 import kv_transfer_service_pb2 as kv_pb
from tests.nodes import PAGE_TOKENS, Spoil, decode, decode_node, prefill_node, spoilt_prefill, until_idle
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint, tiny_config

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()

PAGE_BYTES = PAGE_TOKENS * 2 * tiny_config().kv_dim * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def first_attempt(at: int, change: Spoil) -> Spoil:
    """Spoil one message of the first attempt only."""
    return lambda attempt, number, data: change(attempt, number, data) if (attempt, number) == (1, at) else [data]


def flip_payload_bit(_: int, __: int, data: bytes) -> list[bytes]:
    return [data[:-1] + bytes([data[-1] ^ 1])]


def rewrite_header(**fields: object) -> Spoil:
    def spoil(_: int, __: int, data: bytes) -> list[bytes]:
        header, payload = decode_message(data)
        for name, value in fields.items():
            setattr(header.tile, name, value)
        header.payload = bytes(payload)
        return [header.SerializeToString()]

    return spoil


def end_early(_: int, __: int, ___: bytes) -> list[bytes]:
    complete = kv_pb.TransferComplete(transfer_id="r", epoch=1, num_tiles=3, payload_bytes=1)
    return [kv_pb.PullKvResponse(complete=complete).SerializeToString()]


FAULTS = {
    "connection lost before the first tile": first_attempt(0, lambda *_: None),
    "connection lost in the middle": first_attempt(4, lambda *_: None),
    "payload damaged": first_attempt(3, flip_payload_bit),
    "tile lost": first_attempt(2, lambda *_: []),
    "tile sent twice": first_attempt(1, lambda _, __, data: [data, data]),
    "tile of an older epoch": first_attempt(2, rewrite_header(epoch=0)),
    "tile of another transfer": first_attempt(2, rewrite_header(transfer_id="somebody else's")),
    "tile of another layer": first_attempt(2, rewrite_header(layer=1)),
    "tile at another place": first_attempt(2, rewrite_header(first_token=PROMPT[0] + 1000)),
    "unknown codec": first_attempt(2, rewrite_header(codec=7)),
    "garbage": first_attempt(2, lambda *_: [b"\xff" * 100]),
    "completion before the end": first_attempt(3, end_early),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_spoilt_stream_is_fetched_again_and_the_answer_is_the_oracles(
    checkpoint: Checkpoint, fault: str
) -> None:
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, FAULTS[fault]) as address,
        decode_node(path, [address]) as node,
    ):
        answer = await decode(node.address, PROMPT, num_chains=3)
    assert answer.usage.num_kv_streams == 2
    assert answer.usage.num_decode_prompt_tokens == 1
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


async def test_a_clean_stream_is_fetched_once(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, lambda _, __, data: [data]) as address,
        decode_node(path, [address]) as node,
    ):
        answer = await decode(node.address, PROMPT, num_chains=3)
    config = checkpoint.config
    assert answer.usage.num_kv_streams == 1
    token_bytes = config.num_layers * 2 * config.kv_dim * 4
    assert answer.usage.kv_received_bytes == (len(PROMPT) - 1) * token_bytes


async def test_a_dead_prefill_node_is_replaced_by_another(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, lambda _, number, data: [data] if number < 3 else None) as dying,
        decode_node(path, [dying, prefill.address]) as node,
    ):
        answer = await decode(node.address, PROMPT, num_chains=2)
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 2)


async def test_a_stream_that_never_comes_ends_at_the_deadline(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, lambda _, number, data: [data] if number < 3 else []) as address,
        decode_node(path, [address]) as node,
    ):
        started_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(node.address, PROMPT, timeout_s=1.0)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started_s < 3.0
        await until_idle(node)


async def test_a_prefill_node_of_another_model_is_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=9)
    async with prefill_node(str(other.path)) as prefill, decode_node(str(checkpoint.path), [prefill.address]) as node:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(node.address, PROMPT)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert node.fingerprint[:16] in caught.value.details()
        assert prefill.fingerprint[:16] in caught.value.details()


async def test_fine_tuned_later_chains_share_a_prefill_node(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = checkpoint.load().state_dict()
    tuned = {name: t * 1.5 if name.endswith(("chain2", "chain3")) else t for name, t in tensors.items()}
    other = save(tmp_path / "tuned", checkpoint.config, tuned)
    async with prefill_node(str(checkpoint.path)) as prefill, decode_node(str(other.path), [prefill.address]) as node:
        answer = await decode(node.address, PROMPT, num_chains=3)
    assert_greedy(other.load(), PROMPT, answer.token_ids, 3)


async def test_an_unreachable_prefill_node_is_one_clear_error(checkpoint: Checkpoint) -> None:
    async with decode_node(str(checkpoint.path), ["127.0.0.1:1"]) as node:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(node.address, PROMPT, timeout_s=1.5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        await until_idle(node)


async def test_a_request_beyond_the_pool_is_refused_before_anything_moves(checkpoint: Checkpoint) -> None:
    pages_for_one = 2 * 10  # layers, and pages of 150 prompt tokens and 8 new ones
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], kv_cache_bytes=pages_for_one * PAGE_BYTES) as node,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(node.address, PROMPT, max_new_tokens=64)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "KV pages" in caught.value.details()
        answer = await decode(node.address, PROMPT, max_new_tokens=8)
        assert len(answer.token_ids) == 8
