"""What `colm top` makes of two readings of a cluster's metrics."""

import asyncio
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from rich.console import Console

from cluster.cli.top import _screen
from cluster.scrape import NOTHING, Scrape, Window, scrape
from cluster.top import Watch
from colm.metrics.endpoint import MetricsEndpoint
from colm.nodes import ClusterStatus, ModelStatus, NodeReport, NodeStatus, ProcessFacts, Role

ROOT = Path(__file__).parents[2]
BOUNDS = (0.1, 1.0, 10.0)


def taken(registry: CollectorRegistry, at_s: float) -> Scrape:
    return Scrape.parse(generate_latest(registry).decode(), at_s)


def report(role: Role, address: str) -> NodeReport:
    return NodeReport(
        role=role,
        replica_id="r",
        ray_node_id="n",
        address=address,
        metrics_address=f"metrics of {address}",
        num_active_requests=3,
        num_queued_requests=2,
        num_leases=0,
        num_pages_total=10,
        num_pages_used=4,
        process=ProcessFacts(pid=1, host="h", resident_bytes=1 << 20),
    )


def test_a_counter_is_a_rate_and_a_process_that_began_anew_has_none() -> None:
    registry, anew = CollectorRegistry(), CollectorRegistry()
    counter = Counter("colm_things", "Things.", ["kind"], registry=registry)
    counter.labels("a").inc(5)
    before = taken(registry, 10.0)
    counter.labels("a").inc(6)
    counter.labels("b").inc(2)  # there only since
    window = Window(before, taken(registry, 12.0))
    assert window.rate("colm_things_total", kind="a") == 3.0
    assert window.rate("colm_things_total") == 4.0
    assert window.rate("colm_things_total", kind="c") is None
    Counter("colm_things", "Things.", ["kind"], registry=anew).labels("a").inc(1)
    assert Window(before, taken(anew, 12.0)).rate("colm_things_total", kind="a") is None
    assert Window(NOTHING, NOTHING).rate("colm_things_total") is None


@given(
    earlier=st.lists(st.floats(0, 20), max_size=8),
    seen=st.lists(st.floats(0, 20), min_size=1, max_size=30),
    share=st.floats(0.01, 1),
)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(earlier: list[float], seen: list[float], share: float) -> None:
    registry = CollectorRegistry()
    histogram = Histogram("colm_seconds", "Seconds.", buckets=BOUNDS, registry=registry)
    for value in earlier:
        histogram.observe(value)
    before = taken(registry, 0.0)
    for value in seen:
        histogram.observe(value)
    window = Window(before, taken(registry, 1.0))
    true = sorted(seen)[max(0, math.ceil(share * len(seen) - 1e-9) - 1)]
    upper = min(bound for bound in (*BOUNDS, math.inf) if true <= bound)
    lower = max([0.0, *(bound for bound in BOUNDS if bound < upper)])
    found = window.quantile("colm_seconds", share)
    assert found is not None
    assert lower <= found <= min(upper, BOUNDS[-1])
    assert Window(before, before).quantile("colm_seconds", share) is None


def test_what_several_series_tell_is_summed_and_what_one_model_got_is_told_apart() -> None:
    registry = CollectorRegistry()
    things = Counter("colm_things", "Things.", ["model", "outcome"], registry=registry)
    seconds = Histogram("colm_seconds", "Seconds.", ["model"], buckets=BOUNDS, registry=registry)
    for model, outcome, value in (("a", "good", 0.05), ("a", "bad", 0.05), ("b", "good", 5.0), ("b", "good", 5.0)):
        things.labels(model, outcome).inc()
        seconds.labels(model).observe(value)
    window = Window(NOTHING, taken(registry, 2.0))
    assert (window.now("colm_things_total"), window.rate("colm_things_total", outcome="good")) == (4, 1.5)
    assert window.increases("colm_things_total", "model") == {"a": 2, "b": 2}
    assert window.increase("colm_things_total", outcome="bad", model="b") is None
    found = [window.quantile("colm_seconds", 0.5, model=model) for model in "ab"]
    assert found == [0.05, 5.5]
    assert window.quantile("colm_seconds", 0.75) == 5.5


def test_every_metric_that_is_looked_up_exists_with_these_labels() -> None:
    source, page = (ROOT / "cluster" / "top.py").read_text(), (ROOT / "docs" / "metrics.md").read_text()
    asked = re.findall(r'seen\.(\w+)\(\s*"(\w+)"(?:, (\w+)=)?', source)
    assert len(asked) > 15
    for how, name, label in asked:
        row = re.search(rf"^\| `{name}` \| (\w+)(?:, `([\w,]+)`)? \|", page, re.MULTILINE)
        assert row is not None, name
        assert {how} & {"increases"} or {label} - {""} <= {*(row[2] or "").split(",")}, f"{name} by {label}"


def test_a_look_tells_of_the_time_since_the_one_before() -> None:
    registry = CollectorRegistry()
    steps = Counter("colm_decode_steps", "Steps.", registry=registry)
    seconds = Counter("colm_decode_step_seconds", "Time in which steps ran.", registry=registry)
    Gauge("colm_decode_requests", "Requests.", ["stage"], registry=registry).labels("decoding").set(3)
    clock: Iterator[float] = iter([100.0, 104.0])
    nodes = tuple(NodeStatus(report=report(role, role.value), age_s=0.0) for role in Role)
    models = tuple(
        ModelStatus(name=name, chains=(1,), max_context_tokens=9, fingerprint="f", reads_text=True)
        for name in ("base", "legal")
    )
    legal = NodeStatus(report=replace(report(Role.DECODE, "elsewhere"), variant="legal"), age_s=0.0)
    status = ClusterStatus(models=models, nodes=(*nodes, legal), num_active_requests=7, metrics_address="")

    def read(address: str) -> Scrape | None:
        return taken(registry, next(clock)) if address == "metrics of decode" else None

    watch = Watch(lambda: status, read)
    first = watch.look()
    assert first.decode[0].tokens_per_s is None
    steps.inc(20)
    seconds.inc(1.0)
    view = watch.look()
    (decode, other), (prefill,) = view.decode, view.prefill
    assert (decode.model, other.model) == ("base", "legal")
    assert (decode.step_s, decode.busy, decode.num_decoding) == (0.05, 0.25, 3)
    assert (decode.num_pages_used, decode.num_queued, prefill.num_active) == (4, 2, 3)
    assert prefill.tokens_per_s is None
    assert view.unread == ("gateway", "prefill", "elsewhere")
    console = Console(width=140)
    with console.capture() as shown:
        console.print(_screen(view))
    text = shown.get()
    assert "50.0 ms" in text
    assert "25%" in text
    assert "7 active" in text
    assert "legal 0 active" in text
    assert "elsewhere legal" in text
    assert "no metrics from here of: gateway, prefill" in text


async def test_a_process_is_read_over_http_and_one_that_is_gone_is_not() -> None:
    registry = CollectorRegistry()
    Gauge("colm_things", "Things.", registry=registry).set(4)
    endpoint = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    await endpoint.start()
    found = await asyncio.to_thread(scrape, endpoint.address)
    assert found is not None
    assert Window(found, found).now("colm_things") == 4
    await endpoint.stop()
    assert await asyncio.to_thread(scrape, endpoint.address) is None


def test_what_is_no_metrics_page_is_not_read() -> None:
    with pytest.raises(ValueError, match="invalid metric name"):
        Scrape.parse("<html>hello</html>", 0.0)
