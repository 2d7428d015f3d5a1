"""What each client asks for and gets, by its name in the tokens' file."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from cluster.client_tokens import Clients

OTHERS = "_others"
"""Whoever is no longer in the file; no client can be called so."""
CLUSTER_FULL = "cluster_full"
"""Why a request was refused that no limit of its client's own forbids."""


@dataclass(kw_only=True, slots=True, eq=False)
class ClientCounts:
    """Of one client."""

    ended: Counter[str] = field(default_factory=Counter)
    """Requests, by outcome."""
    refused: Counter[str] = field(default_factory=Counter)
    """Requests for which there was no room, by the limit that was reached."""
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0


class ClientMetrics(Collector):
    """Counts by client, as long as the client is admitted: there are never more series than names in the tokens' file.

    Args:
        clients: who is admitted.
        registry: shows the counts.
    """

    def __init__(self, clients: Clients, registry: CollectorRegistry) -> None:
        self._clients = clients
        self._counts: dict[str, ClientCounts] = {}
        registry.register(self)

    def of(self, client: str) -> ClientCounts:
        """A client's counts, to add to."""
        name = client if client in self._clients.names() else OTHERS
        return self._counts.setdefault(name, ClientCounts())

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Requests, refusals and tokens of each client, and calls of strangers."""
        # Nobody counts up under a name that is gone, and a series that ends says so.
        for name in self._counts.keys() - {*self._clients.names(), OTHERS}:
            del self._counts[name]
        ended = CounterMetricFamily(
            "colm_client_requests_ended", "A client's requests that have ended.", labels=["client", "outcome"]
        )
        refused = CounterMetricFamily(
            "colm_client_requests_refused", "Of those, for which there was no room.", labels=["client", "limit"]
        )
        prompt = CounterMetricFamily("colm_client_prompt_tokens", "Tokens of accepted prompts.", labels=["client"])
        new = CounterMetricFamily("colm_client_new_tokens", "Tokens of answers.", labels=["client"])
        for name, counts in self._counts.items():
            for outcome, count in counts.ended.items():
                ended.add_metric([name, outcome], count)
            for limit, count in counts.refused.items():
                refused.add_metric([name, limit], count)
            prompt.add_metric([name], counts.num_prompt_tokens)
            new.add_metric([name], counts.num_new_tokens)
        yield from (ended, refused, prompt, new)
        yield CounterMetricFamily(
            "colm_calls_unauthenticated", "Calls with no token or a wrong one.", self._clients.num_refused
        )
