"""A client's limits are the same over gRPC and over HTTP: one account, one message, one time to wait."""

import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient as HttpClient
from httpx2 import Response
from prometheus_client import CollectorRegistry

from cluster.accounts import Accounts
from cluster.client_requests import ClientRequests
from cluster.client_tokens import OPERATOR, Client, Clients, TokenLimits, create_token, revoke_token
from cluster.front_door.front_door import FrontDoor
from cluster.generation_service import GenerationService
from cluster.metrics import UNKNOWN, RequestMetrics
from cluster.openai.app import OpenAiApp
from colm.client import AsyncClient
from colm.clock import MonotonicClock
from colm.errors import CapacityExceeded, ColmError, InvalidRequest
from colm.events import Accepted, Token
from colm.wire.endpoint import bind, create_server
from colm.wire.http_server import HttpServer
from colm.wire.security import Security
from tests.clock import FakeClock
from tests.gateway import LIMITS, decode_nodes, served_model
from tests.tiny import tiny_config

OPERATOR_TOKEN = "the operator's"


class NoNode:
    """A pool whose nodes are all taken: what a request may take is known before it needs one."""

    @asynccontextmanager
    async def lease(self, **_: Any) -> AsyncIterator[Any]:
        raise CapacityExceeded("no other decode node is free; try again later", retry_after_s=7.5)
        yield


class TwoDoors:
    """A gateway that both protocols lead to, whose clock stands still."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients = Clients(OPERATOR_TOKEN, path)
        self.clock = FakeClock()
        self.accounts = Accounts(self.clock)
        self.registry = CollectorRegistry()
        self.metrics = RequestMetrics(self.registry, self.clients)
        self.grpc = self.http = ""

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    async def ask_grpc(self, token: str, num_tokens: int) -> ColmError:
        async with AsyncClient(self.grpc, Security(token=token), reconnects=False) as client:
            with pytest.raises(ColmError) as refusal:
                async for _ in client.generate(token_ids=[1] * num_tokens, max_new_tokens=2):
                    pass
        return refusal.value

    async def ask_http(self, token: str, num_tokens: int, **fields: Any) -> Response:
        headers = {"authorization": f"Bearer {token}"}
        body = {"model": "tiny", "prompt": [1] * num_tokens, "max_tokens": 2} | fields
        async with HttpClient(base_url=f"http://{self.http}", headers=headers, timeout=30) as http:
            return await http.post("/v1/completions", json=body)


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[TwoDoors]:
    two = TwoDoors(tmp_path / "tokens.json")
    model = served_model(tiny_config())
    door = FrontDoor(
        model=model,
        limits=LIMITS,
        decode_pool=NoNode(),
        calls=None,  # type: ignore[arg-type]  # nothing is placed
        registry=decode_nodes(1),
        clock=MonotonicClock(),
    )
    server = create_server(Security(token=OPERATOR_TOKEN), lambda token: two.clients.of(token) is not None)
    requests = ClientRequests(door, two.clients, two.accounts, two.metrics)
    GenerationService(requests, upload_idle_s=LIMITS.upload_idle_s).add_to(server)
    two.grpc = f"127.0.0.1:{bind(server, '127.0.0.1', 0, Security())}"
    app = OpenAiApp(requests, limits=LIMITS, files=None)  # type: ignore[arg-type]  # nobody uploads
    http = HttpServer(app.asgi(), host="127.0.0.1", port=0, max_connections=8)
    await server.start()
    await http.start()
    two.http = http.address
    yield two
    await http.stop()
    await server.stop(0)


def said(error: ColmError) -> tuple[str, int]:
    assert isinstance(error, CapacityExceeded)
    return str(error), math.ceil(error.retry_after_s)


def said_over_http(answer: Response) -> tuple[str, int]:
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    return answer.json()["error"]["message"], int(answer.headers["retry-after"])


ACCEPTED = Accepted(request_id="r", model="m", num_prompt_tokens=8, num_chains=1, max_new_tokens=2, timeout_s=1.0)
TOKEN = Token(token_id=1, text="a", logprob=0.0, num_chains=1, top_logprobs=())


async def piece(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.parametrize("at_last_gateway", [False, True])
@pytest.mark.parametrize(
    ("limit", "value", "num_tokens", "shown", "retry_after_s"),
    [
        ("max_requests", 1, 3, "may have 1 requests at once", 1),
        ("max_bytes", 100, 10, "may use 100 bytes", 1),
        ("max_queued_tokens", 10, 3, "may use 10 prompt tokens", 1),
        # 8 were spent 20 s ago, and 12 just now: there is room for 3 when the first are forgotten.
        ("max_tokens_per_minute", 22, 3, "may use 22 tokens a minute.* try again in 40 s", 40),
    ],
)
async def test_both_protocols_refuse_by_the_same_figures(
    doors: TwoDoors, limit: str, value: int, num_tokens: int, shown: str, retry_after_s: int, at_last_gateway: bool
) -> None:
    """What a client uses at a gateway that gives way to this one counts as what it uses here."""
    token = create_token(doors.path, "alice", TokenLimits(**{limit: value}))
    alice = doors.clients.of(token)
    assert isinstance(alice, Client)
    accounts = Accounts(doors.clock) if at_last_gateway else doors.accounts
    with accounts.open(alice) as usage:
        usage.see(ACCEPTED)
        doors.clock.now_s += 20
        for _ in range(12):
            usage.see(TOKEN)
        async for _ in usage.counted(piece(b"x" * 40)):
            pass
        if at_last_gateway:
            doors.accounts.hear("the last gateway", accounts.use())
        over_grpc = await doors.ask_grpc(token, num_tokens)
        over_http = await doors.ask_http(token, num_tokens)
    assert isinstance(over_grpc, CapacityExceeded)
    assert over_grpc.client_limit == limit
    assert said(over_grpc) == said_over_http(over_http)
    message, in_s = said(over_grpc)
    assert re.search(shown, message)
    assert in_s == retry_after_s
    assert doors.count("colm_client_requests_refused_total", client="alice", limit=limit) == 2
    assert doors.count("colm_client_requests_ended_total", client="alice", outcome="capacity_exceeded") == 2


async def test_a_full_cluster_says_so_in_both_and_counts_apart_from_a_clients_limit(doors: TwoDoors) -> None:
    over_grpc, over_http = await doors.ask_grpc(OPERATOR_TOKEN, 5), await doors.ask_http(OPERATOR_TOKEN, 5)
    assert said(over_grpc) == said_over_http(over_http) == ("no other decode node is free; try again later", 8)
    assert doors.count("colm_client_requests_refused_total", client=OPERATOR, limit="cluster_full") == 2
    assert doors.count("colm_client_prompt_tokens_total", client=OPERATOR) == 10


async def test_what_is_refused_as_it_is_read_is_counted_as_over_grpc(doors: TwoDoors) -> None:
    """Bug: over HTTP a request that could not be read was in no count, and not in the audit log."""
    assert (await doors.ask_http(OPERATOR_TOKEN, 5, n=99)).status_code == 400
    assert (await doors.ask_http(OPERATOR_TOKEN, 5, top_p=9)).status_code == 400
    async with AsyncClient(doors.grpc, Security(token=OPERATOR_TOKEN)) as client:
        with pytest.raises(InvalidRequest, match="max_new_tokens"):
            async for _ in client.generate(token_ids=[1], max_new_tokens=401):
                pass
    by_model = [
        doors.count("colm_requests_ended_total", model=model, outcome="invalid_request") for model in (UNKNOWN, "tiny")
    ]
    assert by_model == [2, 1], "what cannot be read says no model"
    assert doors.count("colm_client_requests_ended_total", client=OPERATOR, outcome="invalid_request") == 3


async def test_a_revoked_clients_series_end_and_strangers_have_none(doors: TwoDoors) -> None:
    token = create_token(doors.path, "alice", TokenLimits())
    alice = doors.clients.of(token)
    assert isinstance(alice, Client)
    await doors.ask_http(token, 5)
    assert doors.count("colm_client_prompt_tokens_total", client="alice") == 5
    revoke_token(doors.path, "alice")
    assert doors.count("colm_client_prompt_tokens_total", client="alice") is None
    before = doors.count("colm_calls_unauthenticated_total")
    assert before == 0
    await doors.ask_grpc(token, 5)
    assert (await doors.ask_http(token, 5)).status_code == 401
    assert doors.count("colm_calls_unauthenticated_total") == 2
    with doors.metrics.request(alice.name) as seen:  # a call that outlives its token
        seen.see(TOKEN)
    names = {
        each.labels["client"]
        for family in doors.registry.collect()
        for each in family.samples
        if "client" in each.labels
    }
    assert names == {"_others"}
    create_token(doors.path, "alice", TokenLimits())
    assert doors.count("colm_client_prompt_tokens_total", client="alice") is None
