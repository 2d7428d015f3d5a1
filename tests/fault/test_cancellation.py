"""A caller that goes away, at every stage: both nodes stop and nothing stays held."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from colm.checkpoint import Checkpoint
from colm.wire.endpoint import open_channel
from colm.wire.security import Security
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from decode_node.node import DecodeNode
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from prefill_node.prefill_run import PrefillRun
from tests.gates import LIMIT_S, gate_before
from tests.nodes import decode, decode_node, decode_requests, prefill_node, until_idle, until_prefill_idle
from tests.tiny import tiny_checkpoint, tiny_config

PROMPT = torch.randint(0, 320, (3000,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(max_context=8192, num_layers=4))


@pytest.fixture
async def nodes(checkpoint: Checkpoint) -> AsyncIterator[tuple[PrefillNode, DecodeNode]]:
    path = str(checkpoint.path)
    # What is cancelled is given up, and does not wait for its lease.
    async with prefill_node(path, job_lease_s=1e9) as prefill, decode_node(path, [prefill.address]) as node:
        yield prefill, node


async def cancel_at(node: DecodeNode, event: str, **request: object) -> None:
    async with open_channel(node.address, Security()) as channel:
        call = DecodeServiceStub(channel).Decode(iter(decode_requests(PROMPT, **request)))  # type: ignore[arg-type]
        async for response in call:
            if response.WhichOneof("event") == event:
                break
        call.cancel()


@pytest.mark.parametrize("stage", ["reserved", "prefill_progress", "token"])
async def test_cancelling_frees_both_nodes_at_every_stage(
    nodes: tuple[PrefillNode, DecodeNode], stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a cancellation also left a warning of asyncio about an exception that was never retrieved."""
    prefill, node = nodes
    await cancel_at(node, stage, max_new_tokens=4000)
    await until_idle(node)
    await until_prefill_idle(prefill)
    gc.collect()
    assert [record.message for record in caplog.records if "never retrieved" in record.message] == []


async def test_the_same_request_is_served_after_its_cancellation(nodes: tuple[PrefillNode, DecodeNode]) -> None:
    _, node = nodes
    await cancel_at(node, "prefill_progress")
    await until_idle(node)
    assert len((await decode(node.address, PROMPT[:100])).token_ids) == 8


async def test_cancelling_one_request_leaves_its_neighbours_alone(nodes: tuple[PrefillNode, DecodeNode]) -> None:
    _, node = nodes
    alone = await decode(node.address, PROMPT[:100], request_id="alone", max_new_tokens=40, num_chains=3)
    neighbour = asyncio.create_task(
        decode(node.address, PROMPT[:100], request_id="neighbour", max_new_tokens=40, num_chains=3)
    )
    await asyncio.gather(*[cancel_at(node, "token", request_id=str(i), max_new_tokens=500) for i in range(3)])
    assert (await neighbour).token_ids == alone.token_ids


async def test_a_waiting_prompt_is_given_up_without_ever_reaching_the_engine(
    nodes: tuple[PrefillNode, DecodeNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, node = nodes
    lengths: list[int] = []
    begin = PrefillEngine.begin

    def noted(engine: PrefillEngine, token_ids: NDArray[np.int64], **options: Any) -> PrefillRun:
        lengths.append(len(token_ids))
        return begin(engine, token_ids, **options)

    monkeypatch.setattr(PrefillEngine, "begin", noted)
    with gate_before(PrefillEngine, "step") as gate:
        first = asyncio.create_task(decode(node.address, PROMPT, request_id="first"))
        await gate.until_reached()
        await asyncio.gather(*[cancel_at(node, "reserved", request_id=str(i)) for i in range(3)])
        async with asyncio.timeout(LIMIT_S):
            while sum(node.owner.stages().values()) > 1:
                await asyncio.sleep(0.01)
        gate.open()
        assert len((await first).token_ids) == 8
    await until_prefill_idle(prefill)
    assert lengths == [len(PROMPT) - 1]
