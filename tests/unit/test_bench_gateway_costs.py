"""The benchmark of the gateway's costs: the same answer over both protocols, traced or not."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from bench import gateway_costs
from bench.gateway_costs import Doors, FirstTokenCase, WatchedCase, counted_token_s
from bench.harness.contest import Case, Result, measure
from colm.metrics.endpoint import MetricsEndpoint
from colm.text.tokenizer import Tokenizer
from colm.tracing import TraceFiles, trace_to
from colm.wire.security import Security
from tests.gateway import TakingTurns, gateway, http_gateway
from tests.nodes import decode_node, prefill_node
from tests.tiny import tiny_checkpoint


def measured(case: Case) -> Result:
    with case.contest(0) as contest:
        return measure(contest, 1)


async def test_both_protocols_are_asked_and_only_what_is_watched_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_costs, "PROMPT", "hello")
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tokenizer=True)
    path, tokenizer = str(checkpoint.path), Tokenizer.load(checkpoint)
    endpoint = MetricsEndpoint(CollectorRegistry(), host="127.0.0.1", port=0)
    await endpoint.start()
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address]) as node,
        gateway(checkpoint.config, pool := TakingTurns([node.address]), tokenizer) as grpc,
        http_gateway(checkpoint.config, pool, tokenizer) as http,
    ):
        doors = Doors(grpc=grpc, http=http, security=Security())
        end = trace_to(TraceFiles(folder=str(tmp_path / "traces"), share=0.0), "test")
        first = await asyncio.to_thread(
            measured, FirstTokenCase(doors=doors, num_callers=1, max_new_tokens=2, num_asks=1)
        )
        (file,) = (tmp_path / "traces").iterdir()
        watched = WatchedCase(
            doors=doors, num_callers=2, max_new_tokens=3, metrics=[endpoint.address], interval_s=0.001
        )
        rates = await asyncio.to_thread(measured, watched)
        end()
    await endpoint.stop()
    assert first.seen["gRPC and 5 ms"]["s"].median - first.seen["gRPC"]["s"].median > 0.0049
    assert set(rates.seen) == {"off", "on"}
    # One warm-up and one round, two callers each.
    assert file.read_text().count('"generate"') == 4
    assert counted_token_s(num_tokens=10) >= 0
