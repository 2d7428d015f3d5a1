"""Requests for sparse attention, from a decode node's caller to the engine and back, also over broken streams."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from typer.testing import CliRunner

from cluster.cli import app
from colm.checkpoint import Checkpoint
from colm.errors import InvalidRequest
from colm.kv import KvFormat, KvTile
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import open_channel
from colm.wire.messages import sparse_report_from_pb
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.tile_codec import METHOD, SERVICE, decode_message, decode_tile
from colm.wire.v1 import common_pb2
from prefill_node.engine import PrefillEngine
from prefill_node.settings import PrefillSettings
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import ROW_BLOCK, AuditPolicy, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.gates import LIMIT_S
from tests.gateway import TakingTurns, gateway
from tests.nodes import Answer, decode, decode_node, decode_requests, prefill_node, pull_kv_requests, spoilt_prefill
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint, tiny_config

CONFIG = tiny_config(num_layers=3, max_context=1024)
PROMPT = torch.randint(0, 320, (700,), generator=torch.Generator().manual_seed(1)).tolist()
POLICY = SparsePolicy(mass=None, keys_per_row=260, local_tokens=64, dense_below_tokens=0)
LENIENT = AuditPolicy(floor=0.01, confidence=0.05, max_cost=0.049)
"""Attention of a random model over a short prompt recalls little, from few rows."""
NUM_MESSAGES = 3 * 6 + 2  # `started`, three layers of six tiles, `complete`
SPARSE = common_pb2.ATTENTION_MODE_SPARSE


class Sparse(PrefillSettings):
    """Sparse in short prompts, with fewer keys than the options allow."""

    @property
    def sparse_policy(self) -> SparsePolicy:
        return POLICY

    @property
    def audit_policy(self) -> AuditPolicy:
        return LENIENT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CONFIG, tokenizer=True)


class Line:
    """Records the tiles that pass; the first attempt breaks off at a message, and all later ones if the node dies."""

    def __init__(self, checkpoint: Checkpoint, breaks_at: int | None = None, *, dies: bool = False) -> None:
        self.tiles: list[KvTile] = []
        self._format = KvFormat.of(checkpoint.config, torch.float32)
        self._breaks_at = breaks_at
        self._dies = dies

    def __call__(self, attempt: int, number: int, data: bytes) -> list[bytes] | None:
        if (attempt == 1 and number == self._breaks_at) or (attempt > 1 and self._dies):
            return None
        message, payload = decode_message(data)
        if message.WhichOneof("event") == "tile":
            self.tiles.append(decode_tile(message.tile, payload, self._format))
        return [data]


def assert_the_engines(tiles: Sequence[KvTile], checkpoint: Checkpoint) -> PromptPlans:
    """What passed is what an engine of the same policy computes, bit by bit; returns its plans."""
    engine = PrefillEngine(checkpoint, KvFormat.of(checkpoint.config, torch.float32), tile_tokens=ROW_BLOCK)
    plans = PromptPlans(SparsePlanner(checkpoint.config, POLICY), LENIENT)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        computed = [
            (tile.layer, tile.first_token, tile.k_KTD.clone(), tile.v_KTD.clone())
            for tile in engine.run(np.array(PROMPT[:-1]), sparse=plans)
            if tile.num_tokens
        ]
    finally:
        torch.set_num_threads(num_threads)
    assert len(computed) == len(tiles)
    for (layer, first_token, k_KTD, v_KTD), tile in zip(computed, tiles, strict=True):
        assert (layer, first_token) == (tile.layer, tile.first_token)
        assert torch.equal(k_KTD, tile.k_KTD)
        assert torch.equal(v_KTD, tile.v_KTD)
    return plans


async def ask(checkpoint: Checkpoint, line: Line, second_line: Line | None = None) -> Answer:
    """A sparse request to a decode node before one prefill node, or before two."""
    path, settings = str(checkpoint.path), Sparse(tile_tokens=ROW_BLOCK)
    async with AsyncExitStack() as stack:
        addresses = []
        for each in (line,) if second_line is None else (line, second_line):
            prefill = await stack.enter_async_context(prefill_node(path, settings=settings))
            addresses.append(await stack.enter_async_context(spoilt_prefill(prefill.address, each)))
        node = await stack.enter_async_context(decode_node(path, addresses))
        return await decode(node.address, PROMPT, num_chains=3, attention=SPARSE)


async def test_a_sparse_request_gets_sparse_tiles_and_learns_what_they_recall(checkpoint: Checkpoint) -> None:
    line = Line(checkpoint)
    answer = await ask(checkpoint, line)
    plans = assert_the_engines(line.tiles, checkpoint)
    report = sparse_report_from_pb(answer.responses[-1].finished.sparse)
    assert report == plans.report()
    assert [(layer.layer, layer.num_rows > 0) for layer in report.layers] == [(0, True), (1, True)]


@pytest.mark.parametrize("at", [4, 10, NUM_MESSAGES - 1])
async def test_a_sparse_transfer_that_broke_goes_on_sparse(checkpoint: Checkpoint, at: int) -> None:
    """The last case breaks off before `complete`, when every tile is stored and the job may be forgotten."""
    line = Line(checkpoint, at)
    answer = await ask(checkpoint, line)
    plans = assert_the_engines(line.tiles, checkpoint)
    assert answer.usage.num_kv_streams == 2
    finished = answer.responses[-1].finished
    if at < NUM_MESSAGES - 1:
        assert sparse_report_from_pb(finished.sparse) == plans.report()


async def test_another_node_brings_the_rest_of_a_sparse_transfer_as_the_first_would_have(
    checkpoint: Checkpoint,
) -> None:
    line, second_line = Line(checkpoint, 10, dies=True), Line(checkpoint)
    answer = await ask(checkpoint, line, second_line)
    plans = assert_the_engines([*line.tiles, *second_line.tiles], checkpoint)
    assert answer.usage.num_kv_streams == 3  # the node that held the job is asked once more
    assert sparse_report_from_pb(answer.responses[-1].finished.sparse) == plans.report()


async def test_a_short_prompt_is_dense_whatever_is_asked_and_its_report_says_so(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        answer = await decode(node.address, PROMPT, num_chains=3, attention=SPARSE)
        dense = await decode(node.address, PROMPT, num_chains=3)
    assert_greedy(checkpoint.load(), PROMPT, answer.token_ids, 3)
    layers = sparse_report_from_pb(answer.responses[-1].finished.sparse).layers
    assert [(layer.num_rows, layer.recall, layer.num_dense_heads) for layer in layers] == [(0, 1.0, 4)] * 2
    assert not dense.responses[-1].finished.HasField("sparse")


@pytest.mark.parametrize("attention", ["sparse", "dense"])
async def test_the_command_asks_for_sparse_attention_and_shows_what_the_layers_recall(
    checkpoint: Checkpoint, tmp_path: Path, attention: str
) -> None:
    """Through command, client, gateway, decode node and prefill node."""
    document = tmp_path / "document.txt"
    document.write_text("".join(chr(65 + token_id % 26) for token_id in PROMPT))
    path = str(checkpoint.path)
    async with (
        prefill_node(path, settings=Sparse(tile_tokens=ROW_BLOCK)) as prefill,
        decode_node(path, [prefill.address]) as node,
        gateway(CONFIG, TakingTurns([node.address]), Tokenizer.load(checkpoint)) as address,
    ):
        words = ["submit", str(document), "--address", address, "--attention", attention, "--json"]
        done = await asyncio.wait_for(asyncio.to_thread(CliRunner().invoke, app, words), LIMIT_S)
    assert done.exit_code == 0, done.output
    record = json.loads(done.output.splitlines()[-1])
    if attention == "dense":
        assert "sparse_layers" not in record
        return
    for number, layer in enumerate(record["sparse_layers"]):
        assert (layer["layer"], layer["num_dense_heads"]) == (number, 0)
        assert layer["num_rows"] > 0
        assert 0 < layer["recall_bound"] < layer["recall"] < 1
    assert len(record["sparse_layers"]) == 2


async def test_a_mode_that_is_not_known_is_refused_by_name_at_every_node(checkpoint: Checkpoint) -> None:
    path, unknown = str(checkpoint.path), 7

    async def read(address: str, method: str, requests: Sequence[Message]) -> None:
        async with open_channel(address, Security()) as channel:
            call = channel.stream_stream(method, type(requests[0]).SerializeToString, None)(iter(requests))
            with Outcome(call).errors("node"):
                async for _ in call:
                    pytest.fail("served")

    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        for address, method, requests in (
            (prefill.address, f"/{SERVICE}/{METHOD}", pull_kv_requests(prefill, PROMPT, attention=unknown)),
            (node.address, "/colm.wire.v1.DecodeService/Decode", decode_requests(PROMPT, attention=unknown)),  # type: ignore[arg-type]
        ):
            with pytest.raises(InvalidRequest) as refusal:
                await asyncio.wait_for(read(address, method, requests), LIMIT_S)
            assert (refusal.value.field, refusal.value.value) == ("attention", "7")
