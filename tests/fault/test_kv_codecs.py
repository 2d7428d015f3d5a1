"""Requests whose keys and values travel in int8, beside raw ones, also over broken streams and to other nodes.

Shapes: V vocabulary.
"""

import asyncio
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest
import torch
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv_reference
from google.protobuf.message import Message
from torch import Tensor
from typer.testing import CliRunner

from cluster.cli import app
from colm.checkpoint import Checkpoint
from colm.errors import ColmError, FingerprintMismatch, InvalidRequest
from colm.kv import KvFormat, KvTile
from colm.request import KV_CODECS, KvCodec
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import open_channel
from colm.wire.kv_codec import wire_token_bytes
from colm.wire.messages import CODECS
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.status import error_of
from colm.wire.tile_codec import METHOD, SERVICE, decode_message
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from decode_node.settings import KvCacheDtype
from prefill_node.engine import PrefillEngine
from tests.gates import LIMIT_S
from tests.gateway import TakingTurns, gateway
from tests.nodes import (
    PAGE_TOKENS,
    TILE_TOKENS,
    Answer,
    Spoil,
    decode,
    decode_node,
    decode_requests,
    pages_bytes,
    prefill_node,
    pull_kv_requests,
    spoilt_prefill,
)
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = tiny_config()
FORMAT = KvFormat.of(CONFIG, torch.float32)
NUM_NEW_TOKENS, NUM_CHAINS = 12, 3
PROMPTS = [torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in (5, 19)]
NUM_TILES = 10  # two layers of five
UNKNOWN = 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CONFIG, tokenizer=True)


class Reference(NamedTuple):
    """A greedy answer of the two engines in this process, with no wire between them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    least_gap: float
    """Between the likeliest token and the next one, in logits."""


def after(codec: KvCodec, tokens_KTD: Tensor) -> Tensor:
    """Keys or values as a codec leaves them, by its definition."""
    if codec == "raw":
        return tokens_KTD
    return dequantise_kv(*quantise_kv_reference(tokens_KTD.transpose(0, 1)), FORMAT.dtype).transpose(0, 1)


@cache
def reference(path: Path, prompt: tuple[int, ...], codec: KvCodec, cache_dtype: KvCacheDtype = "model") -> Reference:
    checkpoint, layout = Checkpoint.open(path), KvLayout(FORMAT, PAGE_TOKENS, cache_dtype)
    store = KvStore(layout, layout.pages(len(prompt) + NUM_NEW_TOKENS))
    table_M = np.arange(store.num_pages, dtype=np.int32)
    engine = DecodeEngine(checkpoint, store)
    for tile in PrefillEngine(checkpoint, FORMAT, tile_tokens=TILE_TOKENS).run(np.array(prompt[:-1])):
        store.write(table_M, KvTile(tile.layer, tile.first_token, after(codec, tile.k_KTD), after(codec, tile.v_KTD)))
    token_ids, logprobs, gaps = [prompt[-1]], [], []
    for step in range(NUM_NEW_TOKENS):
        row = PlanRow((token_ids[-1],), len(prompt) - 1 + step, NUM_CHAINS, table_M)
        (logits_V,) = engine.step(StepPlan((row,)))
        first, second = logits_V.topk(2).values.tolist()
        token_ids.append(int(logits_V.argmax()))
        logprobs.append(float(logits_V.double().log_softmax(0).max()))
        gaps.append(first - second)
    return Reference(tuple(token_ids[1:]), tuple(logprobs), min(gaps))


def assert_references(answer: Answer, checkpoint: Checkpoint, prompt: Sequence[int], codec: KvCodec) -> None:
    """Token for token, and nearer to its own codec's probabilities than to the other's."""
    own, other = (reference(checkpoint.path, tuple(prompt), each) for each in (codec, *{*KV_CODECS} - {codec}))
    assert own.least_gap > 0.05, "too close for arithmetic that adds up in another order"
    assert answer.token_ids == own.token_ids
    assert answer.logprobs == pytest.approx(own.logprobs, abs=1e-4)
    assert max(abs(mine - others) for mine, others in zip(answer.logprobs, other.logprobs, strict=True)) > 2e-3


async def ask(address: str, prompt: Sequence[int], codec: KvCodec, request_id: str = "r") -> Answer:
    return await decode(
        address,
        prompt,
        request_id=request_id,
        num_chains=NUM_CHAINS,
        max_new_tokens=NUM_NEW_TOKENS,
        kv_codec=CODECS[codec],
    )


def assert_moved_once(answer: Answer, codec: KvCodec) -> None:
    num_rows = (len(PROMPTS[0]) - 1) * FORMAT.num_layers
    assert answer.usage.kv_received_bytes == num_rows * wire_token_bytes(FORMAT, codec)
    assert answer.usage.kv_effective_bytes == num_rows * FORMAT.layer_token_bytes


async def test_requests_of_both_codecs_side_by_side_get_their_own_references_answers(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    wanted = [(prompt, codec) for prompt in PROMPTS for codec in KV_CODECS]
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        answers = await asyncio.gather(
            *(ask(node.address, *each, request_id=f"r{number}") for number, each in enumerate(wanted))
        )
    for answer, (prompt, codec) in zip(answers, wanted, strict=True):
        assert_references(answer, checkpoint, prompt, codec)
        assert_moved_once(answer, codec)
        assert answer.usage.num_decode_prompt_tokens == 1


async def test_int8_pages_answer_alike_over_either_stream_where_the_models_dtype_has_no_room(
    checkpoint: Checkpoint,
) -> None:
    """A raw stream is quantised on its way into the pages to what an int8 stream brings."""
    path, prompt = str(checkpoint.path), PROMPTS[0]
    num_pages = KvLayout(FORMAT, PAGE_TOKENS).pages(len(prompt) + NUM_NEW_TOKENS - 1)
    kv_cache_bytes = pages_bytes(CONFIG, num_pages, "int8")
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], kv_cache_bytes=kv_cache_bytes, kv_cache_dtype="int8") as node,
        decode_node(path, [prefill.address], kv_cache_bytes=kv_cache_bytes) as small,
    ):
        assert node.load.num_pages_total == num_pages
        answers = {codec: await ask(node.address, prompt, codec, request_id=codec) for codec in KV_CODECS}
        with pytest.raises(grpc.aio.AioRpcError, match=r"11 KV pages and a decode node has 3 in all"):
            await ask(small.address, prompt, "raw")
    assert answers["raw"].logprobs == answers["int8"].logprobs
    wanted = reference(checkpoint.path, tuple(prompt), "raw", "int8")
    assert wanted.least_gap > 0.05, "too close for arithmetic that adds up in another order"
    num_rows = (len(prompt) - 1) * FORMAT.num_layers
    for codec, answer in answers.items():
        assert answer.token_ids == wanted.token_ids
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert answer.usage.kv_received_bytes == num_rows * wire_token_bytes(FORMAT, codec)
        assert answer.usage.kv_effective_bytes == num_rows * wire_token_bytes(FORMAT, "int8")


def breaking_at(at: int, codecs: list[int]) -> Spoil:
    """Breaks the first attempt off at a message; notes the codec of every tile that passes."""

    def spoil(attempt: int, number: int, data: bytes) -> list[bytes] | None:
        message, _ = decode_message(data)
        if message.WhichOneof("event") == "tile":
            codecs.append(message.tile.codec)
        return None if (attempt, number) == (1, at) else [data]

    return spoil


@pytest.mark.parametrize("at", [1, 4, NUM_TILES + 1])
async def test_an_int8_transfer_that_broke_goes_on_and_moves_nothing_twice(checkpoint: Checkpoint, at: int) -> None:
    """In messages that the first stream has not delivered, nothing is rounded again."""
    path, codecs = str(checkpoint.path), list[int]()
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, breaking_at(at, codecs)) as address,
        decode_node(path, [address]) as node,
    ):
        answer = await ask(node.address, PROMPTS[0], "int8")
    assert answer.usage.num_kv_streams == 2
    assert set(codecs) == {common_pb2.CODEC_INT8}
    assert_moved_once(answer, "int8")
    assert_references(answer, checkpoint, PROMPTS[0], "int8")


async def test_another_node_brings_the_rest_of_an_int8_transfer_to_the_bit(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path) as first, prefill_node(path) as second:
        gone = asyncio.Event()

        def dies(_: int, number: int, data: bytes) -> list[bytes] | None:
            if number == 4:
                gone.set()
            return None if gone.is_set() else [data]

        async with (
            spoilt_prefill(first.address, dies) as dying,
            decode_node(path, [dying, second.address]) as node,
        ):
            answer = await ask(node.address, PROMPTS[0], "int8")
    assert answer.usage.num_kv_streams == 3  # the node that held the job is asked once more
    assert_moved_once(answer, "int8")
    assert_references(answer, checkpoint, PROMPTS[0], "int8")


async def tiles_and_words(address: str, method: str, requests: Sequence[Message]) -> list[pb.PullKvResponse]:
    """What a node sends up to its last word; the caller then hangs up."""
    found: list[pb.PullKvResponse] = []
    async with open_channel(address, Security()) as channel:
        call = channel.stream_stream(method, type(requests[0]).SerializeToString, None)(iter(requests))
        with Outcome(call).errors("node"):
            async for message in call:
                found.append(decode_message(message)[0])
                if found[-1].WhichOneof("event") == "complete":
                    call.cancel()
                    break
    return found


@pytest.mark.parametrize(
    ("accepted", "taken"), [([], 1), ([1], 1), ([2], 2), ([UNKNOWN, 2, 1], 2)], ids=["none", "raw", "int8", "some"]
)
async def test_a_node_says_which_of_the_callers_codecs_it_takes_and_writes_every_tile_in_it(
    checkpoint: Checkpoint, accepted: list[int], taken: int
) -> None:
    async with prefill_node(str(checkpoint.path)) as prefill:
        requests = pull_kv_requests(prefill, PROMPTS[0], codecs=accepted)
        found = await asyncio.wait_for(tiles_and_words(prefill.address, f"/{SERVICE}/{METHOD}", requests), LIMIT_S)
    assert [each.started.codec for each in found if each.WhichOneof("event") == "started"] == [taken]
    assert [each.tile.codec for each in found if each.WhichOneof("event") == "tile"] == [taken] * NUM_TILES


async def test_a_codec_that_is_not_known_is_refused_by_name_at_every_node(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        asked: list[tuple[str, str, Sequence[Message]]] = [
            (prefill.address, f"/{SERVICE}/{METHOD}", pull_kv_requests(prefill, PROMPTS[0], codecs=[UNKNOWN])),
            (node.address, "/colm.wire.v1.DecodeService/Decode", decode_requests(PROMPTS[0], kv_codec=UNKNOWN)),  # type: ignore[arg-type]
        ]
        errors = []
        for each in asked:
            with pytest.raises(ColmError) as refusal:
                await asyncio.wait_for(tiles_and_words(*each), LIMIT_S)
            errors.append(refusal.value)
    at_prefill, at_decode = errors
    assert isinstance(at_prefill, FingerprintMismatch)
    assert "sends keys and values in codec raw or int8, the caller accepts 9" in str(at_prefill)
    assert isinstance(at_decode, InvalidRequest)
    assert (at_decode.field, at_decode.value, at_decode.limit) == ("kv_codec", "9", "must be raw or int8")


def as_an_older_node(attempt: int, number: int, data: bytes) -> list[bytes]:  # noqa: ARG001 - a `Spoil`
    """It ignores which codecs are accepted, and says nothing of its own."""
    message, _ = decode_message(data)
    if message.WhichOneof("event") == "started":
        return [pb.PullKvResponse(started=pb.TransferStarted()).SerializeToString()]
    return [data]


async def test_a_node_that_knows_raw_alone_is_good_for_raw_and_refused_for_int8(checkpoint: Checkpoint) -> None:
    """Before its first tile, and no other attempt is made."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, as_an_older_node) as address,
        decode_node(path, [address]) as node,
    ):
        answer = await ask(node.address, PROMPTS[0], "raw")
        assert_references(answer, checkpoint, PROMPTS[0], "raw")
        with pytest.raises(Exception, match="came in codec raw, and int8 was asked for") as refusal:
            await ask(node.address, PROMPTS[0], "int8")
    assert isinstance(error_of(refusal.value, "node"), FingerprintMismatch)  # type: ignore[arg-type]


async def test_a_prompt_that_stays_on_the_decode_node_has_no_codec(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address], max_local_prefill_tokens=64) as node:
        in_int8, in_raw = [await ask(node.address, PROMPTS[0][:40], codec) for codec in ("int8", "raw")]
    assert in_int8.usage.kv_received_bytes == in_int8.usage.kv_effective_bytes == 0
    assert (in_int8.token_ids, in_int8.logprobs) == (in_raw.token_ids, in_raw.logprobs)


@pytest.mark.parametrize("codec", KV_CODECS)
async def test_the_command_asks_for_a_codec_and_says_what_it_moved(
    checkpoint: Checkpoint, tmp_path: Path, codec: KvCodec
) -> None:
    """Through command, client, gateway, decode node and prefill node."""
    document = tmp_path / "document.txt"
    document.write_text("All that is said of keys may be said of values. " * 3)
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], max_local_prefill_tokens=0) as node,
        gateway(CONFIG, TakingTurns([node.address]), Tokenizer.load(checkpoint)) as address,
    ):
        words = ["submit", str(document), "--address", address, "--kv-codec", codec, "--max-new-tokens", "2", "--json"]
        done = await asyncio.wait_for(asyncio.to_thread(CliRunner().invoke, app, words), LIMIT_S)
    assert done.exit_code == 0, done.output
    record = json.loads(done.output.splitlines()[-1])
    num_rows = record["prefill_tokens"] * FORMAT.num_layers
    assert num_rows
    assert record["kv_bytes_received"] == num_rows * wire_token_bytes(FORMAT, codec)
    assert record["kv_bytes_effective"] == num_rows * FORMAT.layer_token_bytes
