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


class SeenRequest:
    """Takes the times of one request's events."""

    def __init__(self, metrics: "RequestMetrics", of_client: ClientCounts) -> None:
        self._metrics = metrics
        self._of_client = of_client
        self._began_s = time.monotonic()
        self._last_s: float | None = None
        self.is_finished = False
        self.is_resumed = False
        """The call goes on with an answer that another gateway began."""

    def see(self, event: Event) -> None:
        """Note an event, before it is sent."""
        match event:
            case Accepted():
                self._metrics.prompt_tokens.inc(event.num_prompt_tokens)
                self._of_client.num_prompt_tokens += event.num_prompt_tokens
            case Token():
                now_s = time.monotonic()
                if self._last_s is None:
                    self._metrics.first_token_s.observe(now_s - self._began_s)
                else:
                    self._metrics.between_tokens_s.observe(now_s - self._last_s)
                self._last_s = now_s
                self._metrics.new_tokens.inc()
                self._of_client.num_new_tokens += 1
            case Finished():
                self.is_finished = True


class RequestMetrics:
    """Counts the gateway's requests, whatever their protocol. Lives on one event loop.

    Args:
        registry: shows the counts.
        clients: whose requests are counted apart.
    """

    def __init__(self, registry: CollectorRegistry, clients: Clients) -> None:
        self._clients = ClientMetrics(clients, registry)
        self._active = Gauge("colm_requests_active", "Requests inside the gateway.", registry=registry)
        self._ended = Counter(
            "colm_requests_ended", "Requests that have ended, by how they did.", ["outcome"], registry=registry
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
        self._seconds = Histogram(
            "colm_request_seconds",
            "From a request's call to its end, however it ended.",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "colm_time_to_first_token_seconds",
            "From a request's call to its first token, its upload included.",
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens_s = Histogram(
            "colm_inter_token_seconds", "From a token to the next one.", buckets=_TOKEN_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("colm_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.new_tokens = Counter("colm_new_tokens", "Tokens of answers.", registry=registry)

    def resubmitted(self, cause: ColmError) -> None:
        """Count a request whose decode node was lost, and which is given to a node again."""
        self._resubmitted.labels(outcome_of(cause)).inc()

    @contextmanager
    def request(self, client: str) -> Iterator[SeenRequest]:
        """Count the request of a client that lasts as long as the block."""
        of_client = self._clients.of(client)
        seen, began_s, outcome = SeenRequest(self, of_client), time.monotonic(), "lost"
        with self._active.track_inprogress():
            try:
                yield seen
                outcome = "complete" if seen.is_finished else "lost"
            except BaseException as err:
                outcome = outcome_of(err)
                if isinstance(err, CapacityExceeded):
                    of_client.refused[err.client_limit or CLUSTER_FULL] += 1
                raise
            finally:
                self._ended.labels(outcome).inc()
                of_client.ended[outcome] += 1
                if seen.is_resumed:
                    self._resumed.labels(outcome).inc()
                self._seconds.observe(time.monotonic() - began_s)


class PoolMetrics(Collector):
    """Shows the pools whose size follows their load, looked up whenever it is asked."""

    def __init__(self, nodes: NodeRegistry, registry: CollectorRegistry) -> None:
        self._nodes = nodes
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Replicas that are wanted, those that are there, and what says how many are wanted."""
        wanted = GaugeMetricFamily("colm_pool_wanted_replicas", "Replicas that the load asks for.", labels=["pool"])
        present = GaugeMetricFamily(
            "colm_pool_present_replicas", "Replicas that have reported of late.", labels=["pool"]
        )
        demand = GaugeMetricFamily(
            "colm_pool_demand_replicas",
            "Replicas, with a fraction, that would carry the load at the pool's target.",
            labels=["pool"],
        )
        queued = GaugeMetricFamily(
            "colm_pool_queued_seconds",
            "Engine time of the prompts on prefill nodes and in line for one, as estimated.",
            labels=["pool"],
        )
        for pool in self._nodes.pools:
            name = [pool.role.value]
            wanted.add_metric(name, pool.num_wanted)
            present.add_metric(name, pool.num_present)
            demand.add_metric(name, pool.demand)
            if pool.role is Role.PREFILL:
                queued.add_metric(name, pool.queued_s)
        yield from (wanted, present, demand, queued)


def targets(own_address: str, nodes: list[NodeStatus]) -> list[dict[str, object]]:
    """The cluster's processes in the form of Prometheus' `http_sd_configs`, each with its role."""
    places = [("gateway", own_address)]
    places += [(node.report.role.value, node.report.metrics_address) for node in nodes]
    return [{"targets": [address], "labels": {"role": role}} for role, address in places if address]
