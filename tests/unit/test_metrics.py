"""What Prometheus reads: counts of real nodes, of faults, and that the documentation lists every metric."""

import asyncio
import json
import re
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from cluster.client_tokens import OPERATOR, Clients
from cluster.metrics import UNKNOWN, PoolMetrics, RequestMetrics, targets
from colm.checkpoint import Checkpoint
from colm.errors import CapacityExceeded, ConfigError
from colm.events import Accepted, Finished, FinishReason, Timings, Token, Usage
from colm.kv import KvFormat
from colm.metrics.endpoint import MetricsEndpoint
from colm.metrics.kv_stream import KvStreamMetrics
from colm.nodes import ClusterStatus, PoolStatus, Role
from tests.gateway import decode_nodes
from tests.nodes import decode, decode_node, pages_bytes, prefill_node, spoilt_prefill
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def read(address: str, path: str) -> tuple[int, str]:
    connection = HTTPConnection(address, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


async def test_both_ends_count_what_has_moved(checkpoint: Checkpoint) -> None:
    moved_bytes = (len(PROMPT) - 1) * KvFormat.of(checkpoint.config, torch.float32).token_bytes
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        answer = await decode(node.address, PROMPT, num_chains=2)
        for registry in (prefill.metrics, node.metrics):
            assert value(registry, "colm_kv_streams_started_total") == 1
            assert value(registry, "colm_kv_streams_resumed_total") == 0
            assert value(registry, "colm_kv_streams_ended_total", outcome="complete") == 1
            assert value(registry, "colm_kv_bytes_total") == moved_bytes
            assert value(registry, "colm_kv_stream_seconds_count") == 1
        assert value(prefill.metrics, "colm_kv_tiles_total") == value(node.metrics, "colm_kv_tiles_total") == 10
        assert value(prefill.metrics, "colm_kv_window_bytes") == 0
        assert value(prefill.metrics, "colm_prefill_tokens_total") == len(PROMPT) - 1
        assert value(prefill.metrics, "colm_prefill_jobs", state="active") == 0
        assert value(node.metrics, "colm_decode_tokens_total", num_chains="2") == len(answer.token_ids)
        assert value(node.metrics, "colm_decode_auto_chains") == 3
        assert value(node.metrics, "colm_decode_requests_ended_total", outcome="finished") == 1
        assert value(node.metrics, "colm_decode_pages", state="used") == 0
        page_bytes = pages_bytes(checkpoint.config, 1)
        assert value(node.metrics, "colm_decode_page_bytes", format="float32") == page_bytes


async def test_a_stream_that_broke_and_the_one_that_went_on_are_told_apart(checkpoint: Checkpoint) -> None:
    def breaks_once(attempt: int, number: int, data: bytes) -> list[bytes] | None:
        return None if (attempt, number) == (1, 4) else [data]

    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        spoilt_prefill(prefill.address, breaks_once) as address,
        decode_node(path, [address]) as node,
    ):
        await decode(node.address, PROMPT, num_chains=1)
        assert value(node.metrics, "colm_kv_streams_started_total") == 2
        assert value(node.metrics, "colm_kv_streams_resumed_total") == 1
        assert value(node.metrics, "colm_kv_streams_ended_total", outcome="connection_lost") == 1
        assert value(node.metrics, "colm_kv_streams_ended_total", outcome="complete") == 1
        assert value(prefill.metrics, "colm_kv_streams_resumed_total") == 1


def finished() -> Finished:
    usage = dict.fromkeys(
        ("num_prompt_tokens", "num_prefill_tokens", "num_decode_prompt_tokens", "num_new_tokens"), 1
    ) | {"kv_received_bytes": 0, "kv_effective_bytes": 0, "num_kv_streams": 0}
    timings = dict.fromkeys(("queue_s", "prefill_s", "first_token_s", "decode_s"), 0.0)
    return Finished(reason=FinishReason.LENGTH, usage=Usage(**usage), timings=Timings(**timings), text="", sparse=None)


def test_the_gateway_counts_a_request_by_how_it_ended() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry, Clients(None))
    token = Token(token_id=1, text="a", logprob=0.0, num_chains=1, top_logprobs=())
    accepted = Accepted(
        request_id="r", model="legal", num_prompt_tokens=9, num_chains=1, max_new_tokens=2, timeout_s=1.0
    )
    with metrics.request(OPERATOR) as seen:
        assert active(registry) == {(UNKNOWN, "waiting"): 1}
        seen.asks("legal")
        seen.see(accepted)
        assert active(registry) == {("legal", "waiting"): 1}
        for event in (token, token, token, finished()):
            seen.see(event)
        assert active(registry) == {("legal", "answering"): 1}
    with suppress(CapacityExceeded), metrics.request(OPERATOR) as seen:
        seen.asks("base")
        raise CapacityExceeded("full")
    with pytest.raises(asyncio.CancelledError), metrics.request(OPERATOR):
        raise asyncio.CancelledError
    with pytest.raises(ZeroDivisionError), metrics.request(OPERATOR):
        raise ZeroDivisionError
    with metrics.request(OPERATOR):
        pass
    ends = {"complete": "legal", "capacity_exceeded": "base", "cancelled": UNKNOWN, "failed": UNKNOWN, "lost": UNKNOWN}
    counted = [value(registry, "colm_requests_ended_total", model=model, outcome=end) for end, model in ends.items()]
    assert counted == [1] * len(ends)
    assert active(registry) == {}
    assert value(registry, "colm_time_to_first_token_seconds_count", model="legal") == 1
    assert value(registry, "colm_inter_token_seconds_count", model="legal") == 2
    assert value(registry, "colm_prompt_tokens_total", model="legal") == 9
    assert value(registry, "colm_new_tokens_total", model="legal") == 3
    assert value(registry, "colm_request_seconds_count", model=UNKNOWN) == 3


def active(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Requests inside, by model and stage, where there are any."""
    (family,) = (each for each in registry.collect() if each.name == "colm_requests_active")
    return {(it.labels["model"], it.labels["stage"]): it.value for it in family.samples if it.value}


async def test_the_endpoint_serves_metrics_and_targets_and_nothing_else() -> None:
    nodes = decode_nodes(2).nodes()
    decoding = [
        replace(node, report=replace(node.report, metrics_address=f"127.0.0.1:{2 + number}", variant=variant))
        for number, (node, variant) in enumerate(zip(nodes, ("", "legal"), strict=True))
    ]
    registry, places = CollectorRegistry(), targets("127.0.0.1:1", decoding, "base")
    KvStreamMetrics(registry)
    with_targets = MetricsEndpoint(registry, host="127.0.0.1", port=0, targets=lambda: places)
    without = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    await with_targets.start()
    await without.start()

    async def ask(endpoint: MetricsEndpoint, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(read, endpoint.address, path)

    status, body = await ask(with_targets, "/metrics")
    assert status == 200
    assert "colm_kv_bytes_total 0.0" in body
    assert json.loads((await ask(with_targets, "/targets"))[1]) == [
        {"targets": ["127.0.0.1:1"], "labels": {"role": "gateway"}},
        {"targets": ["127.0.0.1:2"], "labels": {"role": "decode", "model": "base"}},
        {"targets": ["127.0.0.1:3"], "labels": {"role": "decode", "model": "legal"}},
    ]
    assert (await ask(without, "/targets"))[0] == 404
    assert (await ask(without, "/"))[0] == 404
    for endpoint in (with_targets, without):
        await endpoint.stop()
        with pytest.raises(ConnectionRefusedError):
            await ask(endpoint, "/metrics")


@pytest.mark.parametrize(
    ("is_alive", "is_ready", "live", "ready"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, True, 503, 503), (False, False, 503, 503)],
)
async def test_the_endpoint_says_whether_its_process_works(
    *, is_alive: bool, is_ready: bool, live: int, ready: int
) -> None:
    endpoint = MetricsEndpoint(
        CollectorRegistry(), host="127.0.0.1", port=0, is_alive=lambda: is_alive, is_ready=lambda: is_ready
    )
    await endpoint.start()
    said = [(await asyncio.to_thread(read, endpoint.address, path))[0] for path in ("/live", "/ready")]
    assert said == [live, ready]
    await endpoint.stop()


async def test_a_port_that_is_taken_is_named_with_the_way_out() -> None:
    first = MetricsEndpoint(CollectorRegistry(), host="127.0.0.1", port=0)
    await first.start()
    port = int(first.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"port {port} is taken.*set metrics\.host or metrics\.port"):
        await MetricsEndpoint(CollectorRegistry(), host="127.0.0.1", port=port).start()
    await first.stop()


async def test_the_documentation_lists_every_metric_and_its_labels(checkpoint: Checkpoint) -> None:
    gateway, path = CollectorRegistry(), str(checkpoint.path)
    metrics = RequestMetrics(gateway, Clients(None))
    metrics.resubmitted(CapacityExceeded("full"))
    pools = decode_nodes(1)
    pools.pools = (
        PoolStatus(
            role=Role.PREFILL, num_present=1, num_wanted=2, min_replicas=1, max_replicas=2, demand=1.5, queued_s=9.0
        ),
    )
    PoolMetrics(pools, "base", gateway)
    with suppress(CapacityExceeded), metrics.request(OPERATOR) as seen:
        seen.is_resumed = True
        raise CapacityExceeded("full")
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        await decode(node.address, PROMPT, num_chains=1)
        shown = {
            (sample_name(family), family.type, labels_of(family))
            for registry in (gateway, prefill.metrics, node.metrics)
            for family in registry.collect()
        }
    rows = re.findall(r"^\| `(\w+)` \| (\w+)(?:, `([\w,]+)`)? \|", PAGE.read_text(), re.MULTILINE)
    assert {(name, kind, label) for name, kind, label in rows} == shown


def sample_name(family: Any) -> str:
    return str(family.name) + ("_total" if family.type == "counter" else "")


def labels_of(family: Any) -> str:
    names = dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le")
    return ",".join(names)


def test_who_is_not_the_operator_sees_no_address_of_metrics() -> None:
    (node,) = decode_nodes(1).nodes()
    shown = replace(node, report=replace(node.report, metrics_address="10.0.0.1:9"))
    status = ClusterStatus(models=(), nodes=(shown,), num_active_requests=0, metrics_address="10.0.0.1:8")
    assert "10.0.0.1" in str(status)
    assert "10.0.0.1" not in str(status.without_places())
