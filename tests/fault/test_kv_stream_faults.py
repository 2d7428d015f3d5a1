"""A KV stream that goes wrong: the answer is either the right one or one clear error, and nothing stays held."""

import asyncio
import queue
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import xxhash

from colm.checkpoint import Checkpoint, save
from colm.errors import DeadlineExceeded, LeaseExpired
from colm.kv import KvFormat, KvTile
from colm.kv_position import KvPosition
from colm.leases import LeaseTable
from colm.retry import RetryPolicy
from colm.wire.endpoint import open_blocking_channel
from colm.wire.security import Security
from colm.wire.status import error_of
from colm.wire.tile_codec import decode_message, pull_kv_stub, seal
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as kv_pb
from decode_node import node as node_module
from prefill_node import encoded_tile, prefill_job
from prefill_node import service as prefill_service
from prefill_node.engine import PrefillEngine
from prefill_node.prefill_run import PrefillRun
from tests.gates import LIMIT_S, gate_before
from tests.nodes import (
    TILE_TOKENS,
    Spoil,
    decode,
    decode_node,
    is_reached,
    prefill_node,
    pull_kv_requests,
    spoilt_prefill,
    until_idle,
)
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def prompt_bytes(checkpoint: Checkpoint) -> int:
    """Keys and values of what the prefill node computes, each once."""
    return (len(PROMPT) - 1) * KvFormat.of(checkpoint.config, torch.float32).token_bytes


def first_attempt(at: int, change: Spoil) -> Spoil:
    """Spoil one message of the first attempt only."""
    return lambda attempt, number, data: change(attempt, number, data) if (attempt, number) == (1, at) else [data]


def flip_payload_bit(_: int, __: int, data: bytes) -> list[bytes]:
    return [data[:-1] + bytes([data[-1] ^ 1])]


def flip_header_bit(_: int, __: int, data: bytes) -> list[bytes]:
    """A length that does not fit the payload, as a tile in another format has."""
    header, payload = decode_message(data)
    header.tile.num_tokens ^= 1
    header.payload = bytes(payload)
    return [header.SerializeToString()]


def rewrite_header(**fields: object) -> Spoil:
    def spoil(_: int, __: int, data: bytes) -> list[bytes]:
        header, payload = decode_message(data)
        for name, value in fields.items():
            setattr(header.tile, name, value)
        seal(header.tile)
        header.payload = bytes(payload)
        return [header.SerializeToString()]

    return spoil


def end_early(_: int, __: int, data: bytes) -> list[bytes]:
    transfer_id = decode_message(data)[0].tile.transfer_id
    complete = kv_pb.TransferComplete(transfer_id=transfer_id, epoch=1, num_tiles=3, payload_bytes=1)
    return [kv_pb.PullKvResponse(complete=complete).SerializeToString()]


def wait_for_nothing_known(_: int, __: int, data: bytes) -> list[bytes]:
    return [kv_pb.PullKvResponse(queued=common_pb2.Queued()).SerializeToString(), data]


FAULTS = {
    "queued for nothing that is known": first_attempt(0, wait_for_nothing_known),
    "connection lost before the first tile": first_attempt(0, lambda *_: None),
    "connection lost in the middle": first_attempt(4, lambda *_: None),
    "payload damaged": first_attempt(3, flip_payload_bit),
    "header damaged": first_attempt(3, flip_header_bit),
    "tile lost": first_attempt(2, lambda *_: []),
    "tile sent twice": first_attempt(1, lambda _, __, data: [data, data]),
    "tile of an older epoch": first_attempt(2, rewrite_header(epoch=0)),
    "tile of another transfer": first_attempt(2, rewrite_header(transfer_id="somebody else's")),
    "tile of another layer": first_attempt(2, rewrite_header(layer=1)),
    "tile at another place": first_attempt(2, rewrite_header(first_token=PROMPT[0] + 1000)),
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
    assert answer.usage.kv_received_bytes == prompt_bytes(checkpoint)
    assert answer.usage.num_decode_prompt_tokens == 1
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


def drop_half_the_heads(_: int, __: int, data: bytes) -> list[bytes]:
    """A whole tile of a model with half the kv heads."""
    header, payload = decode_message(data)
    header.payload = bytes(payload[: len(payload) // 2])
    header.tile.checksum = xxhash.xxh3_64_intdigest(header.payload)
    seal(header.tile)
    return [header.SerializeToString()]


FORMATS = {
    "unknown codec": (rewrite_header(codec=7), "codec 7, which this node cannot read"),
    "other heads": (drop_half_the_heads, "in this node's format they are"),
}


@pytest.mark.parametrize("fault", FORMATS)
async def test_a_tile_in_another_format_is_final(checkpoint: Checkpoint, fault: str) -> None:
    """Bug: such a tile was fetched eight times, although it comes the same way each time."""
    change, problem = FORMATS[fault]
    path, attempts = str(checkpoint.path), set[int]()

    def spoil(attempt: int, number: int, data: bytes) -> list[bytes] | None:
        attempts.add(attempt)
        return change(attempt, number, data) if number == 2 else [data]

    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, spoil) as address,
        decode_node(path, [address]) as node,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(node.address, PROMPT)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert problem in caught.value.details()
    assert attempts == {1}


async def test_a_clean_stream_is_fetched_once(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, lambda _, __, data: [data]) as address,
        decode_node(path, [address]) as node,
    ):
        answer = await decode(node.address, PROMPT, num_chains=3)
    assert answer.usage.num_kv_streams == 1
    assert answer.usage.kv_received_bytes == prompt_bytes(checkpoint)


async def test_a_dead_prefill_node_is_replaced_by_another(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, lambda _, number, data: [data] if number < 3 else None) as dying,
        decode_node(path, [dying, prefill.address]) as node,
    ):
        answer = await decode(node.address, PROMPT, num_chains=2)
    assert answer.usage.kv_received_bytes == prompt_bytes(checkpoint)
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
        assert time.monotonic() - started_s < 30.0
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


async def test_an_unreachable_prefill_node_is_one_clear_error(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "RetryPolicy", lambda: RetryPolicy(first_pause_s=0.001, last_pause_s=0.001))
    async with decode_node(str(checkpoint.path), ["127.0.0.1:1"]) as node:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(node.address, PROMPT)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "gave up after 8 attempts to prefill" in caught.value.details()
        assert "127.0.0.1:1 is not reachable" in caught.value.details()


async def test_a_real_tile_of_a_broken_stream_is_void_in_the_next_one(checkpoint: Checkpoint) -> None:
    """Late bytes of the first attempt arrive in the second: right place, right checksum, older epoch."""
    kept: list[bytes] = []

    def replay(attempt: int, number: int, data: bytes) -> list[bytes] | None:
        if attempt == 1:
            kept.append(data)
            return [data] if number < 4 else None
        # Message 4 never arrived, so the second attempt begins with its place, behind `started`.
        return [kept[4]] if (attempt, number) == (2, 1) else [data]

    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, replay) as address,
        decode_node(path, [address]) as node,
    ):
        answer = await decode(node.address, PROMPT, num_chains=3)
    header, _ = decode_message(kept[4])
    assert (header.WhichOneof("event"), header.tile.epoch) == ("tile", 1)
    assert answer.usage.num_kv_streams == 3
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


async def test_one_prefill_node_out_of_memory_is_replaced_by_another(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: only a lost connection was failed over; a MemoryError on one of two nodes was INTERNAL to the client."""
    path, step = str(checkpoint.path), PrefillEngine.step
    async with (
        prefill_node(path) as poor,
        prefill_node(path) as rich,
        decode_node(path, [poor.address, rich.address]) as node,
    ):
        poor_engine = poor.service._engine

        def run_out_of_memory(engine: PrefillEngine, runs: Sequence[PrefillRun]) -> list[KvTile | None]:
            if engine is poor_engine:
                raise MemoryError
            return step(engine, runs)

        monkeypatch.setattr(PrefillEngine, "step", run_out_of_memory)
        answer = await decode(node.address, PROMPT, num_chains=3)
    assert answer.usage.num_kv_streams == 2
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)


async def test_a_reader_that_stores_nothing_stops_the_engine_and_gets_all_when_it_does(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_job, "WINDOW_BYTES", 8 << 20)
    prompt = np.arange(500) % 320
    # 50 MB of keys and values: far more than gRPC keeps on the way.
    config = replace(checkpoint.config, num_layers=48, explicit_head_dim=128)
    num_encoded = 0
    encode = encoded_tile.encode_tile

    def counted(*args: Any, **kwargs: Any) -> bytes:
        nonlocal num_encoded
        num_encoded += 1
        return encode(*args, **kwargs)

    monkeypatch.setattr(encoded_tile, "encode_tile", counted)
    with tempfile.TemporaryDirectory() as folder:
        deep = tiny_checkpoint(Path(folder) / "deep", config)
        async with prefill_node(str(deep.path)) as prefill:
            total = config.num_layers * -(-len(prompt) // TILE_TOKENS)
            with open_blocking_channel(prefill.address, Security()) as channel:
                stored: queue.SimpleQueue[kv_pb.PullKvRequest | None] = queue.SimpleQueue()
                asked = pull_kv_requests(prefill, prompt.tolist())
                call = pull_kv_stub(channel)(chain(asked, iter(stored.get, None)))
                while True:
                    before = num_encoded
                    await asyncio.sleep(0.3)
                    if before and num_encoded == before:
                        break
                assert num_encoded < total

                def read() -> Iterator[kv_pb.PullKvResponse]:
                    for data in call:
                        message, _ = decode_message(data)
                        if not is_reached(data):
                            yield message
                        if message.WhichOneof("event") == "tile":
                            tile = message.tile
                            end = KvPosition(tile.layer, tile.first_token).after(tile.num_tokens, len(prompt))
                            stored.put(
                                kv_pb.PullKvRequest(acknowledged=kv_pb.KvPosition(layer=end.layer, token=end.token))
                            )
                    stored.put(None)

                messages = await asyncio.to_thread(lambda: list(read()))
    assert [message.WhichOneof("event") for message in messages] == ["started", *["tile"] * total, "complete"]


async def test_an_expired_lease_is_worth_another_try(checkpoint: Checkpoint) -> None:
    """Bug: an expired lease was INVALID_ARGUMENT about a field that the client never sent."""
    leases = LeaseTable(0.01)
    async with prefill_node(str(checkpoint.path), leases=leases) as prefill:
        with open_blocking_channel(prefill.address, Security()) as channel:
            call = pull_kv_stub(channel)(iter(pull_kv_requests(prefill, [1], lease_id="gone")))
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.to_thread(list, call)
        assert isinstance(error_of(caught.value, "prefill node"), LeaseExpired)
        assert not len(leases)


async def test_a_prompt_that_a_prefill_node_waits_for_in_vain_is_sent_again(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the caller, who had set no deadline, was told that the deadline was over."""
    read, late = prefill_service.read_token_ids, [DeadlineExceeded("the next piece did not come within 30 s")]

    async def impatient(requests: Any, num_tokens: int) -> Any:
        if late:
            raise late.pop()
        return await read(requests, num_tokens)

    monkeypatch.setattr(prefill_service, "read_token_ids", impatient)
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        answer = await decode(node.address, PROMPT, num_chains=3)
    assert answer.usage.num_kv_streams == 2
    assert answer.usage.kv_received_bytes == prompt_bytes(checkpoint)


async def test_a_prefill_node_whose_line_is_full_refuses(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path, max_queued=1) as prefill, AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(decode_node(path, [prefill.address])) for _ in range(3)]
        with gate_before(PrefillEngine, "step") as gate:
            running = asyncio.create_task(decode(nodes[0].address, PROMPT))
            await gate.until_reached()
            waiting = asyncio.create_task(decode(nodes[1].address, PROMPT))
            async with asyncio.timeout(LIMIT_S):
                while not prefill.service.load.num_queued:
                    await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await decode(nodes[2].address, PROMPT)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1 requests wait for this prefill node already" in caught.value.details()
            gate.open()
            assert (await running).token_ids == (await waiting).token_ids
