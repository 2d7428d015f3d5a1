"""What the gateway counts of its requests, and where the cluster's processes are read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cluster.client_metrics import CLUSTER_FULL, ClientCounts, ClientMetrics
from cluster.client_tokens import Clients
from cluster.node_registry import NodeRegistry
from colm.errors import CapacityExceeded, ColmError
from colm.events import Accepted, Event, Finished, Token
from colm.metrics.kv_stream import SECONDS, outcome_of
from colm.nodes import NodeStatus, Role

_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


UNKNOWN = "_unknown"
"""Stands for the model of requests that have not said which they ask, or one that nobody serves."""


class _OfModel:
    """A model's series."""

    def __init__(self, metrics: "RequestMetrics", model: str) -> None:
        self.waiting = metrics.active.labels(model, "waiting")
        self.answering = metrics.active.labels(model, "answering")
        self.seconds = metrics.seconds.labels(model)
        self.first_token_s = metrics.first_token_s.labels(model)
        self.between_tokens_s = metrics.between_tokens_s.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.new_tokens = metrics.new_tokens.labels(model)


class SeenRequest:
    """Takes the times of one request's events."""

    def __init__(self, metrics: "RequestMetrics", of_client: ClientCounts) -> None:
        self._metrics = metrics
        self._of_client = of_client
        self._began_s = time.monotonic()
        self._last_s: float | None = None
        self.model = UNKNOWN
        self._of_model = metrics.of(UNKNOWN)
        self._active = self._of_model.waiting
        self._active.inc()
        self.is_finished = False
        self.is_resumed = False
        """The call goes on with an answer that another gateway began."""

    def asks(self, model: str) -> None:
        """Note which model it asks, one that is served."""
        self.model, self._of_model = model, self._metrics.of(model)
        self._move(self._of_model.waiting)

    def see(self, event: Event) -> None:
        """Note an event, before it is sent."""
        match event:
            case Accepted():
                self.asks(event.model)
                self._of_model.prompt_tokens.inc(event.num_prompt_tokens)
                self._of_client.num_prompt_tokens += event.num_prompt_tokens
            case Token():
                now_s = time.monotonic()
                if self._last_s is None:
                    self._move(self._of_model.answering)
                    self._of_model.first_token_s.observe(now_s - self._began_s)
                else:
                    self._of_model.between_tokens_s.observe(now_s - self._last_s)
                self._last_s = now_s
                self._of_model.new_tokens.inc()
                self._of_client.num_new_tokens += 1
            case Finished():
                self.is_finished = True

    def end(self) -> None:
        """It is inside no more."""
        self._active.dec()
        self._of_model.seconds.observe(time.monotonic() - self._began_s)

    def _move(self, active: Gauge) -> None:
        self._active.dec()
        self._active = active
        self._active.inc()


class RequestMetrics:
    """Counts the gateway's requests, whatever their protocol. Lives on one event loop.

    Args:
        registry: shows the counts.
        clients: whose requests are counted apart.
    """

    def __init__(self, registry: CollectorRegistry, clients: Clients) -> None:
        self._clients = ClientMetrics(clients, registry)
        self._models: dict[str, _OfModel] = {}
        self.active = Gauge(
            "colm_requests_active",
            "Requests inside the gateway, by their model and by whether they have a token.",
            ["model", "stage"],
            registry=registry,
        )
        self._ended = Counter(
            "colm_requests_ended",
            "Requests that have ended, by their model and how they did.",
            ["model", "outcome"],
            registry=registry,
        )
        self._resumed = Counter(
            "colm_requests_resumed",
            "Of those, calls for the rest of an answer whose gateway was lost.",
            ["outcome"],
            registry=registry,
        )
        self._resubmitted = Counter(
            "colm_requests_resubmitted",
            "Requests given to a decode node again, with the answer so far, by what became of the node before.",
            ["reason"],
            registry=registry,
        )
        self.continued = Counter(
            "colm_requests_continued",
            "Requests that their client submitted again, with the answer so far.",
            registry=registry,
        )
        self.seconds = Histogram(
            "colm_request_seconds",
            "From a request's call to its end, however it ended.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "colm_time_to_first_token_seconds",
            "From a request's call to its first token, its upload included.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens_s = Histogram(
            "colm_inter_token_seconds",
            "From a token to the next one.",
            ["model"],
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter("colm_prompt_tokens", "Tokens of accepted prompts.", ["model"], registry=registry)
        self.new_tokens = Counter("colm_new_tokens", "Tokens of answers.", ["model"], registry=registry)

    def of(self, model: str) -> _OfModel:
        """The series of a model that is served, or of `UNKNOWN`."""
        if (found := self._models.get(model)) is None:
            found = self._models[model] = _OfModel(self, model)
        return found

    def resubmitted(self, cause: ColmError) -> None:
        """Count a request whose decode node was lost, and which is given to a node again."""
        self._resubmitted.labels(outcome_of(cause)).inc()

    @contextmanager
    def request(self, client: str) -> Iterator[SeenRequest]:
        """Count the request of a client that lasts as long as the block."""
        of_client = self._clients.of(client)
        seen, outcome = SeenRequest(self, of_client), "lost"
        try:
            yield seen
            outcome = "complete" if seen.is_finished else "lost"
        except BaseException as err:
            outcome = outcome_of(err)
            if isinstance(err, CapacityExceeded):
                of_client.refused[err.client_limit or CLUSTER_FULL] += 1
            raise
        finally:
            seen.end()
            self._ended.labels(seen.model, outcome).inc()
            of_client.ended[outcome] += 1
            if seen.is_resumed:
                self._resumed.labels(outcome).inc()


class PoolMetrics(Collector):
    """Shows the pools whose size follows their load, looked up whenever it is asked.

    Args:
        nodes: has them.
        model: the cluster's own.
        registry: shows them.
    """

    def __init__(self, nodes: NodeRegistry, model: str, registry: CollectorRegistry) -> None:
        self._nodes = nodes
        self._model = model
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Replicas that are wanted, those that are there, and what says how many are wanted."""
        wanted = GaugeMetricFamily(
            "colm_pool_wanted_replicas", "Replicas that the load asks for.", labels=["pool", "model"]
        )
        present = GaugeMetricFamily(
            "colm_pool_present_replicas", "Replicas that have reported of late.", labels=["pool", "model"]
        )
        demand = GaugeMetricFamily(
            "colm_pool_demand_replicas",
            "Replicas, with a fraction, that would carry the load at the pool's target.",
            labels=["pool", "model"],
        )
        queued = GaugeMetricFamily(
            "colm_pool_queued_seconds",
            "Engine time of the prompts on prefill nodes and in line for one, as estimated.",
            labels=["pool", "model"],
        )
        for pool in self._nodes.pools:
            name = [pool.role.value, "" if pool.role is Role.PREFILL else pool.variant or self._model]
            wanted.add_metric(name, pool.num_wanted)
            present.add_metric(name, pool.num_present)
            demand.add_metric(name, pool.demand)
            if pool.role is Role.PREFILL:
                queued.add_metric(name, pool.queued_s)
        yield from (wanted, present, demand, queued)


def targets(own_address: str, nodes: list[NodeStatus], model: str) -> list[dict[str, object]]:
    """The cluster's processes in the form of Prometheus' `http_sd_configs`, each with its role.

    Args:
        own_address: the gateway's.
        nodes: the others.
        model: the cluster's own; a decode node has the name of that which it serves.
    """
    places = [({"role": "gateway"}, own_address)]
    for node in nodes:
        served = {"model": node.report.variant or model} if node.report.role is Role.DECODE else {}
        places.append(({"role": node.report.role.value} | served, node.report.metrics_address))
    return [{"targets": [address], "labels": labels} for labels, address in places if address]
