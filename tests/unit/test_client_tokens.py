"""Tokens of clients: made, listed and revoked in a file that a running gateway rereads."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from cluster import client_tokens
from cluster.accounts import Accounts
from cluster.audit_log import AuditLog
from cluster.cli import app
from cluster.client_tokens import Client, Clients, TokenLimits, create_token, digest, read_clients, revoke_token
from colm.errors import CapacityExceeded, ClusterError, InvalidRequest
from colm.events import Accepted, Finished, FinishReason, Timings, Token, Usage
from colm.wire import health
from colm.wire.endpoint import bind, create_server, open_channel
from colm.wire.security import Security
from colm.wire.v1 import common_pb2
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.clock import FakeClock
from tests.gateway import TakingTurns, gateway
from tests.tiny import tiny_config

OPERATOR_TOKEN = "the operator's"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "client_tokens.json"


def client(**limits: int) -> Client:
    return Client(name="alice", sha256=digest("x"), limits=TokenLimits(**limits))


def accepted(num_prompt_tokens: int) -> Accepted:
    return Accepted(
        request_id="r",
        model="tiny",
        num_prompt_tokens=num_prompt_tokens,
        num_chains=1,
        max_new_tokens=8,
        timeout_s=60.0,
    )


def token() -> Token:
    return Token(token_id=1, text="secret answer", logprob=0.0, num_chains=1, top_logprobs=())


async def parts(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_a_token_is_valid_from_the_next_call_on_and_revoked_from_the_next_call_on(path: Path) -> None:
    clients = Clients(OPERATOR_TOKEN, path)
    assert clients.of(OPERATOR_TOKEN).is_operator
    alice = create_token(path, "alice", TokenLimits(max_requests=2))
    bob = create_token(path, "bob", TokenLimits())
    found = clients.of(alice)
    assert (found.name, found.limits.max_requests, found.is_operator) == ("alice", 2, False)
    assert clients.of(alice[:-1]) is None
    revoke_token(path, "alice")
    assert clients.of(alice) is None
    assert clients.of(bob).name == "bob"
    path.unlink()
    assert clients.of(bob) is None
    assert clients.of(OPERATOR_TOKEN).is_operator


def test_the_file_holds_no_token_and_is_for_this_user_alone(path: Path) -> None:
    made = create_token(path, "alice", TokenLimits())
    assert made not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_leaves_the_clients_as_they_were(path: Path) -> None:
    made = create_token(path, "alice", TokenLimits())
    clients = Clients(OPERATOR_TOKEN, path)
    assert clients.of(made) is not None
    path.write_text("{")
    assert clients.of(made) is not None


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "a" * 65, "operator", "alice"])
def test_a_name_that_cannot_be_one_is_refused(path: Path, name: str) -> None:
    create_token(path, "alice", TokenLimits())
    with pytest.raises(ClusterError, match="name"):
        create_token(path, name, TokenLimits())
    assert [one.name for one in read_clients(path)] == ["alice"]


def test_a_file_that_others_may_read_or_that_is_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    create_token(path, "alice", TokenLimits())
    path.chmod(0o644)
    with pytest.raises(ClusterError, match="chmod it to 600"):
        read_clients(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ClusterError, match="cannot read"):
        read_clients(link)


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    def colm(*words: str) -> str:
        done = CliRunner().invoke(app, ["token", *words, "--state-dir", str(tmp_path / "state")])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout

    made = json.loads(colm("create", "alice", "--max-requests", "3", "--json"))
    assert Clients(OPERATOR_TOKEN, tmp_path / "state" / "client_tokens.json").of(made["token"]).name == "alice"
    (listed,) = json.loads(colm("list", "--json"))["clients"]
    assert (listed["name"], listed["limits"]["max_requests"]) == ("alice", 3)
    colm("revoke", "alice")
    assert json.loads(colm("list", "--json")) == {"clients": []}
    with pytest.raises(ClusterError, match="no client 'alice'"):
        colm("revoke", "alice")


def test_requests_at_once_are_limited_for_each_client_alone() -> None:
    accounts, alice = Accounts(FakeClock()), client(max_requests=1)
    with accounts.open(alice):
        with pytest.raises(CapacityExceeded, match="'alice' may have 1 requests"), accounts.open(alice):
            pass
        with accounts.open(Client(name="bob", sha256="", limits=TokenLimits(max_requests=1))):
            pass
    with accounts.open(alice):
        pass


async def test_bytes_are_limited_over_all_requests_of_a_client() -> None:
    accounts, alice = Accounts(FakeClock()), client(max_bytes=10)
    with accounts.open(alice) as first:
        assert [part async for part in first.counted(parts(b"12345", b"678"))] == [b"12345", b"678"]
        with accounts.open(alice) as second, pytest.raises(CapacityExceeded, match="10 bytes"):
            [part async for part in second.counted(parts(b"123"))]
    with accounts.open(alice) as third, pytest.raises(InvalidRequest, match="may send 10 bytes"):
        [part async for part in third.counted(parts(b"12345678901"))]


def test_prompt_tokens_at_once_and_tokens_a_minute_are_limited() -> None:
    clock = FakeClock()
    accounts, alice = Accounts(clock), client(max_queued_tokens=100, max_tokens_per_minute=150)
    with accounts.open(alice) as first:
        first.see(accepted(80))
        with accounts.open(alice) as second, pytest.raises(CapacityExceeded, match="100 prompt tokens"):
            second.see(accepted(30))
        for _ in range(40):
            first.see(token())
    with accounts.open(alice) as third, pytest.raises(CapacityExceeded, match="150 tokens a minute"):
        third.see(accepted(31))
    clock.now_s += 60.0
    with accounts.open(alice) as fourth:
        fourth.see(accepted(100))
    with accounts.open(alice) as fifth, pytest.raises(InvalidRequest, match="may use 100 prompt tokens"):
        fifth.see(accepted(101))


def test_the_audit_log_has_sizes_and_outcomes_and_no_content(tmp_path: Path) -> None:
    now = datetime(2026, 11, 25, 12, tzinfo=UTC)
    accounts = Accounts(FakeClock(), AuditLog(tmp_path / "audit", keep_days=2, now=lambda: now))
    with accounts.open(client()) as usage:
        usage.see(accepted(5))
        usage.see(token())
        usage.see(
            Finished(
                reason=FinishReason.STOP, usage=no_usage(), timings=no_timings(), text="secret answer", sparse=None
            )
        )
    with pytest.raises(CapacityExceeded), accounts.open(client(max_requests=1)):
        raise CapacityExceeded("no room")
    with pytest.raises(asyncio.CancelledError), accounts.open(client()):
        raise asyncio.CancelledError
    lines = [json.loads(line) for line in (tmp_path / "audit" / "2026-11-25.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["finished", "CapacityExceeded", "cancelled"]
    assert {"client": "alice", "request_id": "r", "prompt_tokens": 5, "new_tokens": 1}.items() <= lines[0].items()
    assert "secret" not in (tmp_path / "audit" / "2026-11-25.jsonl").read_text()
    assert os.stat(tmp_path / "audit" / "2026-11-25.jsonl").st_mode & 0o777 == 0o600


def test_the_audit_log_keeps_so_many_days_and_no_other_file(tmp_path: Path) -> None:
    day = datetime(2026, 11, 25, 12, tzinfo=UTC)
    (tmp_path / "notes.jsonl").write_text("mine")
    times = iter([day, day + timedelta(days=1), day + timedelta(days=2)])
    log = AuditLog(tmp_path, keep_days=2, now=lambda: next(times))
    for _ in range(3):
        log.write(client="alice")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "2026-11-26.jsonl",
        "2026-11-27.jsonl",
        "notes.jsonl",
    ]


def no_usage() -> Usage:
    return Usage(**dict.fromkeys(Usage.__dataclass_fields__, 0))


def no_timings() -> Timings:
    return Timings(**dict.fromkeys(Timings.__dataclass_fields__, 0.0))


async def test_where_the_nodes_are_is_for_the_operator_alone(path: Path) -> None:
    """Bug: `status` told every client the nodes' addresses and processes."""
    alice = create_token(path, "alice", TokenLimits())
    clients = Clients(OPERATOR_TOKEN, path)
    async with gateway(tiny_config(), TakingTurns([""]), clients=clients) as address:

        async def node_of(shown: str | None) -> pb.Node:
            security = Security(token=shown)
            async with open_channel(address, security) as channel:
                stub = GenerationServiceStub(channel)
                status = await stub.GetClusterStatus(
                    pb.GetClusterStatusRequest(), metadata=security.metadata(), timeout=30
                )
            return status.nodes[0]

        assert (await node_of(OPERATOR_TOKEN)).pid == os.getpid()
        shown = await node_of(alice)
        assert (shown.role, shown.pid, shown.host, shown.ray_node_id, shown.address) == (pb.ROLE_DECODE, 0, "", "", "")
        for stranger in ("x", None):
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await node_of(stranger)


async def test_a_call_of_a_revoked_token_is_ended_and_those_of_others_go_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a revoked client's calls went on until their own deadline."""
    monkeypatch.setattr(client_tokens, "_LOOK_S", 0.02)
    tokens = {name: create_token(path, name, TokenLimits()) for name in ("alice", "bob")} | {"operator": OPERATOR_TOKEN}
    clients, log = Clients(OPERATOR_TOKEN, path), AuditLog(tmp_path / "audit", keep_days=1)
    async with (
        gateway(tiny_config(), TakingTurns([""]), clients=clients, audit_log=log) as address,
        AsyncExitStack() as stack,
    ):

        async def open_call(shown: str) -> Any:
            security = Security(token=shown)
            channel = await stack.enter_async_context(open_channel(address, security))
            call = GenerationServiceStub(channel).Generate(metadata=security.metadata(), timeout=60)
            await call.write(pb.GenerateRequest(open=pb.OpenGenerate(max_new_tokens=1)))
            await call.write(pb.GenerateRequest(token_ids=common_pb2.TokenIds(ids=[1])))
            return call

        calls = {name: await open_call(shown) for name, shown in tokens.items()}
        async with open_channel(address, operator := Security(token=OPERATOR_TOKEN)) as channel:
            stub = GenerationServiceStub(channel)

            async def num_active() -> int:
                request = pb.GetClusterStatusRequest()
                status = await stub.GetClusterStatus(request, metadata=operator.metadata(), timeout=30)
                return int(status.num_active_requests)

            while await num_active() < 3:
                await asyncio.sleep(0.01)
            revoke_token(path, "alice")
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await calls["alice"].read()
            assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert ended.value.details() == "the token has been revoked"
            assert await num_active() == 2
        assert not calls["bob"].done()
        assert not calls["operator"].done()
        (line,) = [
            json.loads(line) for file in (tmp_path / "audit").iterdir() for line in file.read_text().splitlines()
        ]
        assert (line["client"], line["outcome"]) == ("alice", "Unauthenticated")


async def test_no_more_calls_watch_health_than_there_are_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: health needs no token, and a call that watches it lasted as long as its caller wanted."""
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    server = create_server(Security(token=OPERATOR_TOKEN))
    health_pb2_grpc.add_HealthServicer_to_server(health.BoundedHealth(), server)
    port = bind(server, "127.0.0.1", 0, Security())
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", Security()) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watching = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for call in watching:
                await call.read()
            with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
                await stub.Watch(health_pb2.HealthCheckRequest(), timeout=30).read()
            assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)).status
    finally:
        await server.stop(0)
