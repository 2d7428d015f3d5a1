"""What HTTP costs beside gRPC, and what metrics and traces cost, through the gateway of a cluster of this machine.

The same greedy answers over both protocols in turns: one at a time for the first token, several at once for throughput.
Then over HTTP with every request traced and every process scraped once a second, and without either: a cluster that
records traces records those whose caller asks for it, so one cluster does both. Wanted: HTTP adds less than 5 ms to the
first token and takes less than 3% of the throughput; metrics and traces take less than 2%.
"""

import json
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from statistics import median
from typing import Any, Self

from prometheus_client import CollectorRegistry

from bench.harness.contest import Bar, Case, Contest, Run
from bench.harness.suite import Options, arguments, positive, run
from bench.head_of_line.clusters import running
from cluster.client_tokens import OPERATOR, Clients
from cluster.metrics import RequestMetrics
from cluster.scrape import scrape
from cluster.state import ClusterState
from colm.client import Client
from colm.events import Finished, Token
from colm.sampling import SamplingParams
from colm.wire.security import Security

PROMPT = "Say in a few plain words what a cache is, and why one would want it to be small. " * 4
MAX_ADDED_S = 0.005
_LIMIT_S = 120.0
_ON, _OFF = "01", "00"
"""Of a `traceparent`: whether the trace is recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Doors:
    """A gateway's two addresses."""

    grpc: str
    http: str
    security: Security

    @classmethod
    def of(cls, state: ClusterState) -> Self:
        """Those of a cluster."""
        return cls(grpc=state.gateway_address, http=state.http_address, security=state.security)

    def connect(self) -> HTTPConnection:
        """A connection that may be used again and again."""
        if (tls := self.security.current_tls) is None:
            return HTTPConnection(self.http, timeout=_LIMIT_S)
        trusted = ssl.create_default_context(cadata=tls.ca_pem.decode())
        return HTTPSConnection(self.http, timeout=_LIMIT_S, context=trusted)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """An answer, as its client saw it."""

    text: str
    num_tokens: int
    first_token_s: float


def ask_grpc(client: Client, max_new_tokens: int) -> Seen:
    """Ask over gRPC."""
    began_s, first_s, texts, num_tokens = time.perf_counter(), 0.0, [], 0
    options: Any = {"max_new_tokens": max_new_tokens, "sampling": SamplingParams(ignore_eos=True), "chat": True}
    for event in client.generate("", PROMPT, **options):
        if isinstance(event, Token):
            first_s = first_s or time.perf_counter()
            num_tokens += 1
        if isinstance(event, Token | Finished):
            texts.append(event.text)
    return Seen(text="".join(texts), num_tokens=num_tokens, first_token_s=first_s - began_s)


def ask_http(connection: HTTPConnection, token: str | None, max_new_tokens: int, traced: str) -> Seen:
    """Ask over HTTP, streaming, on a connection that has just been opened, as a channel of gRPC's is open."""
    connection.close()  # the gateway ends one that was idle for some seconds
    connection.request("GET", "/health")
    connection.getresponse().read()
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json", "traceparent": f"00-{time.monotonic_ns():032x}-{1:016x}-{traced}"}
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    began_s, first_s, texts, num_tokens = time.perf_counter(), 0.0, [], 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if not chunk["choices"]:
            num_tokens = chunk["usage"]["completion_tokens"]
            continue
        (choice,) = chunk["choices"]
        if "num_chains" in choice:
            first_s = first_s or time.perf_counter()
        texts.append(choice["delta"].get("content", ""))
    return Seen(text="".join(texts), num_tokens=num_tokens, first_token_s=first_s - began_s)


class Callers(AbstractContextManager["Callers"]):
    """Clients of both protocols, each with a connection of its own.

    Args:
        doors: whom they ask.
        num_callers: at once.
        max_new_tokens: of each answer.
    """

    def __init__(self, doors: Doors, num_callers: int, max_new_tokens: int) -> None:
        self._token = doors.security.token
        self._max_new_tokens = max_new_tokens
        self._clients = [Client(doors.grpc, doors.security) for _ in range(num_callers)]
        self._connections = [doors.connect() for _ in range(num_callers)]
        self._threads = ThreadPoolExecutor(num_callers)

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for client, connection in zip(self._clients, self._connections, strict=True):
            client.close()
            connection.close()

    def check(self) -> None:
        """Both protocols give the same answer."""
        (one, *_), (other, *_) = self.over_grpc(), self.over_http()
        assert one.text == other.text, f"over gRPC {one.text!r}, over HTTP {other.text!r}"
        assert one.num_tokens == other.num_tokens == self._max_new_tokens

    def over_grpc(self) -> list[Seen]:
        """Everybody asks once."""
        return list(self._threads.map(lambda each: ask_grpc(each, self._max_new_tokens), self._clients))

    def over_http(self, traced: str = _OFF) -> list[Seen]:
        """Everybody asks once."""
        return list(
            self._threads.map(lambda each: ask_http(each, self._token, self._max_new_tokens, traced), self._connections)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class GatewayCase(Case):
    """A cluster to ask."""

    doors: Doors
    num_callers: int
    max_new_tokens: int

    @property
    def shape(self) -> dict[str, Any]:
        """Without the cluster's addresses."""
        return {"num_callers": self.num_callers, "max_new_tokens": self.max_new_tokens, "prompt_chars": len(PROMPT)}


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstTokenCase(GatewayCase):
    """The first token over either protocol."""

    num_asks: int = 8
    """In a turn, whose median counts."""

    @property
    def name(self) -> str:
        """By what it compares."""
        return "first token"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """HTTP is held against gRPC with what it may add."""
        del seed  # nothing is drawn
        over_grpc_s = 0.0

        with Callers(self.doors, self.num_callers, self.max_new_tokens) as callers:

            def grpc() -> Mapping[str, float]:
                nonlocal over_grpc_s
                over_grpc_s = median(callers.over_grpc()[0].first_token_s for _ in range(self.num_asks))
                return {"s": over_grpc_s}

            def http_() -> Mapping[str, float]:
                return {"s": median(callers.over_http()[0].first_token_s for _ in range(self.num_asks))}

            contenders: dict[str, Run] = {
                "gRPC": grpc,
                "HTTP": http_,
                "gRPC and 5 ms": lambda: {"s": over_grpc_s + MAX_ADDED_S},
            }
            bar = Bar("http", best_of=["HTTP"], over=["gRPC and 5 ms"], at_least=1.0)
            yield Contest(check=callers.check, contenders=contenders, bars=[bar])


@dataclass(frozen=True, kw_only=True, eq=False)
class ThroughputCase(GatewayCase):
    """Tokens of all callers together, over either protocol."""

    @property
    def name(self) -> str:
        """By what it compares."""
        return "throughput"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """A turn is one answer for everybody."""
        del seed
        with Callers(self.doors, self.num_callers, self.max_new_tokens) as callers:
            contenders: dict[str, Run] = {
                "gRPC": lambda: _rate(callers.over_grpc),
                "HTTP": lambda: _rate(callers.over_http),
            }
            bar = Bar("http", best_of=["HTTP"], over=["gRPC"], at_least=0.97)
            yield Contest(check=callers.check, contenders=contenders, compared_by="tokens_per_s", bars=[bar])


@dataclass(frozen=True, kw_only=True, eq=False)
class WatchedCase(GatewayCase):
    """Tokens of all callers together, with metrics and traces and without."""

    metrics: Sequence[str]
    """Where the processes are read."""
    interval_s: float = 1.0

    @property
    def name(self) -> str:
        """By what it compares."""
        return "metrics and traces"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Counting cannot be turned off; what it takes of a token is a fact of its own."""
        del seed
        with Callers(self.doors, self.num_callers, self.max_new_tokens) as callers:

            def watched() -> Mapping[str, float]:
                with self._scraped():
                    return _rate(lambda: callers.over_http(_ON))

            contenders: dict[str, Run] = {"off": lambda: _rate(callers.over_http), "on": watched}
            yield Contest(
                check=callers.check,
                contenders=contenders,
                compared_by="tokens_per_s",
                bars=[Bar("on", best_of=["on"], over=["off"], at_least=0.98)],
                facts={"counted_token_s": counted_token_s()},
            )

    @contextmanager
    def _scraped(self) -> Iterator[None]:
        ends = threading.Event()

        def read() -> None:
            while not ends.wait(self.interval_s):
                for address in self.metrics:
                    scrape(address)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield
        finally:
            ends.set()
            reader.join()


def counted_token_s(num_tokens: int = 50_000) -> float:
    """What the gateway's counting takes of one token; seconds of the processor."""
    token = Token(token_id=1, text="a", logprob=0.0, num_chains=1, top_logprobs=())
    with RequestMetrics(CollectorRegistry(), Clients(None)).request(OPERATOR) as seen:
        began_s = time.process_time()
        for _ in range(num_tokens):
            seen.see(token)
        return (time.process_time() - began_s) / num_tokens


def _rate(ask: Any) -> Mapping[str, float]:
    began_s = time.perf_counter()
    num_tokens = sum(each.num_tokens for each in ask())
    return {"tokens_per_s": num_tokens / (time.perf_counter() - began_s)}


class CostOptions(Options):
    """And what is asked of which model."""

    model: Path
    callers: int
    max_new_tokens: int


def main() -> None:
    """Bring a cluster up, and measure the three."""
    parser = arguments("bench.gateway_costs", __doc__, rounds=7)
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint that reads text")
    parser.add_argument("--callers", type=positive, default=4, help="at once, where throughput is measured; 4")
    parser.add_argument("--max-new-tokens", type=positive, default=96, help="of each of their answers; 96")
    options = parser.parse_args(namespace=CostOptions())
    with tempfile.TemporaryDirectory(prefix="colm-bench-traces-") as folder:
        # Requests that do not ask for a trace are not recorded.
        traced = {"tracing.folder": folder, "tracing.share": 0.0}
        with running(options.model, None, traced) as state:
            doors = Doors.of(state)
            with Client(doors.grpc, doors.security) as client:
                status = client.cluster_status()
            places = [status.metrics_address, *(node.report.metrics_address for node in status.nodes)]
            many: dict[str, Any] = {
                "doors": doors, "num_callers": options.callers, "max_new_tokens": options.max_new_tokens,
            }  # fmt: skip
            cases: list[Case] = [
                FirstTokenCase(doors=doors, num_callers=1, max_new_tokens=2),
                ThroughputCase(**many),
                WatchedCase(**many, metrics=places),
            ]
            run(cases, options, model=options.model.name)


if __name__ == "__main__":
    main()
