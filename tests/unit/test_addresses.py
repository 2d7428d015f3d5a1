"""Hosts of every kind: how they are written, listened on and dialled, and which errors name a bad one."""

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.lifecycle import _dangers, up
from cluster.options import load_config
from colm.checkpoint import Checkpoint
from colm.errors import ClusterError
from colm.wire.endpoint import bind, create_server, dial_address, join_address, open_channel, why_not
from colm.wire.security import Security, new_tls
from tests.gateway import LIMITS
from tests.nodes import EVERYWHERE, LOOPBACK, decode, decode_node, prefill_node
from tests.secret_folder import secret_files
from tests.tiny import tiny_checkpoint

ELSEWHERE = "192.0.2.200"  # an address of the block reserved for documentation
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("address") / "tiny")


@pytest.mark.parametrize(
    ("host", "listened", "dialled"),
    [
        ("127.0.0.1", "127.0.0.1:5", "127.0.0.1:5"),
        ("0.0.0.0", "0.0.0.0:5", "127.0.0.1:5"),
        ("::1", "[::1]:5", "[::1]:5"),
        ("::", "[::]:5", "[::1]:5"),
        ("2001:db8::7", "[2001:db8::7]:5", "[2001:db8::7]:5"),
        ("localhost", "localhost:5", "localhost:5"),
    ],
)
def test_an_address_is_written_so_that_it_can_be_dialled(host: str, listened: str, dialled: str) -> None:
    assert (join_address(host, 5), dial_address(host, 5)) == (listened, dialled)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", LOOPBACK, EVERYWHERE])
async def test_a_server_listens_where_it_is_told_and_is_reached_there(host: str) -> None:
    """Bug: "::1" was bound as "::1:5"."""
    security = Security(token="t", tls=new_tls())
    server = create_server(security)
    port = bind(server, host, 0, security)
    await server.start()
    try:
        assert why_not(host, port) == f"port {port} is taken; choose another, 0 picks a free one"
        async with open_channel(dial_address(host, port), security) as channel:
            await asyncio.wait_for(channel.channel_ready(), 30)
    finally:
        await server.stop(0)
    assert why_not(host, 0) is None


async def test_servers_share_a_port_if_both_say_so() -> None:
    servers = [create_server(Security(), shares_port=True) for _ in range(2)]
    port = 0
    for server in servers:
        port = bind(server, "127.0.0.1", port, Security(), shares_port=True)
        await server.start()
    try:
        assert "taken" in str(why_not("127.0.0.1", port))
        async with open_channel(f"127.0.0.1:{port}", Security()) as channel:
            await servers[0].stop(0)
            await asyncio.wait_for(channel.channel_ready(), 30)
    finally:
        for server in servers:
            await server.stop(0)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (ELSEWHERE, f"'{ELSEWHERE}' is not an address of this machine"),
        ("2001:db8::7", "'2001:db8::7' is not an address of this machine"),
        ("no-such-host.invalid", "'no-such-host.invalid' is no address and no name that resolves"),
    ],
)
async def test_a_host_that_is_not_ours_is_told_from_a_taken_port(host: str, reason: str) -> None:
    """Bug: whatever was wrong with the host, the error said that the port is taken."""
    with pytest.raises(OSError, match=reason):
        bind(create_server(Security()), host, 0, Security())
    assert "taken" not in str(why_not(host, 5))


def test_up_tells_a_host_that_is_not_ours_from_a_taken_port(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def bring_up(host: str, port: int) -> str:
        config = load_config(None, {"model.path": checkpoint.path, "gateway.host": host, "gateway.port": port})
        with pytest.raises(ClusterError) as refusal:
            up(config, tmp_path, lambda _: pytest.fail("went on to start something"))
        return str(refusal.value)

    with socket.create_server((LOOPBACK, 0), family=socket.getaddrinfo(LOOPBACK, 0)[0][0]) as held:
        port = held.getsockname()[1]
        assert f"gateway.port={port}" in (refusal := bring_up(LOOPBACK, port))
        assert "is taken" in refusal
    assert f"gateway.host='{ELSEWHERE}'" in (refusal := bring_up(ELSEWHERE, 0))
    assert "not an address of this machine" in refusal


@pytest.mark.parametrize(
    ("host", "dangers"), [("127.0.0.1", []), (LOOPBACK, []), (EVERYWHERE, ["token='off'", "tls='off'"])]
)
def test_a_gateway_that_admits_other_machines_without_token_or_tls_is_called_insecure(
    host: str, dangers: list[str]
) -> None:
    """Bug: nobody was warned."""
    switched_off = {"security.token": "off", "security.tls": "off"}
    told = _dangers(load_config(None, {"gateway.host": host} | switched_off))
    assert [danger.rpartition("security.")[2].split()[0] for danger in told] == dangers
    assert not _dangers(load_config(None, {"gateway.host": host}))


def test_nodes_of_several_machines_without_tls_are_called_insecure() -> None:
    joined = {"ray.address": "auto", "security.folder": "f"}
    (danger,) = _dangers(load_config(None, joined | {"security.tls": "off"}))
    assert "the nodes' token, keys and values in plaintext" in danger
    assert not _dangers(load_config(None, joined))


async def test_nodes_serve_each_other_over_ipv6(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with (
        prefill_node(path, host=LOOPBACK) as prefill,
        decode_node(path, [prefill.address], host=LOOPBACK) as node,
    ):
        assert node.address == dial_address(LOOPBACK, int(node.address.rpartition(":")[2]))
        assert len((await decode(node.address, range(3, 60), max_new_tokens=2)).token_ids) == 2


async def test_the_gateway_says_where_it_is_reached_that_it_serves_and_after_a_sigterm_serves_until_another_one_does(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.replicas import gateway as module
    from cluster.replicas.gateway import GatewayReplica  # imports Ray Serve
    from cluster.replicas.gateway_options import GatewayOptions

    options = GatewayOptions(
        model_path=str(checkpoint.path),
        model_name="tiny",
        dtype="float32",
        host=EVERYWHERE,
        http_port=0,
        max_files_bytes=1 << 20,
        files_folder=None,
        cluster="colm",
        metrics_host=None,
        metrics_port=0,
        traces=None,
        port=0,
        limits=LIMITS,
        audit_folder=None,
        audit_keep_days=30,
        num_decode_nodes=1,
        drain_s=0.0,
        scalings=(),
    )
    secrets = secret_files(tmp_path)
    ray = SimpleNamespace(get_temp_dir=lambda: str(tmp_path), get_session_name=lambda: "session")
    monkeypatch.setattr(module, "ray", SimpleNamespace(get_runtime_context=lambda: ray))

    class Gateway(GatewayReplica):
        def __del__(self) -> None:
            """Serve awaits this method in place of the interpreter; the test calls it by its name."""

    gateway = Gateway.__new__(Gateway)
    handle = SimpleNamespace(options=lambda **_: None)  # nobody decodes here
    await gateway.__init__(options, secrets, handle)  # type: ignore[misc]
    await gateway.reconfigure({"is_open": False})
    assert not gateway._ports.is_open
    await gateway.reconfigure({"is_open": True})
    address = (await gateway.addresses())[0]
    assert address == dial_address(EVERYWHERE, int(address.rpartition(":")[2]))
    stranger = Security(tls=secrets.of_clients().tls)  # a health checker has no token
    async with open_channel(address, stranger) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "colm.wire.v1.GenerationService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert answer.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=30)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert (await watch.read()).status == SERVING
        succeeded, asked = asyncio.get_running_loop().create_future(), asyncio.Event()

        def addresses() -> asyncio.Future[None]:
            asked.set()
            return succeeded

        there = SimpleNamespace(
            get_replica_context=lambda: SimpleNamespace(deployment="gateway", app_name="colm"),
            get_deployment_handle=lambda *_: SimpleNamespace(addresses=SimpleNamespace(remote=addresses)),
        )
        monkeypatch.setattr(module, "serve", there)
        await gateway.check_health()
        gateway._leaving.has_begun = True
        with pytest.raises(RuntimeError, match="SIGTERM"):
            await gateway.check_health()
        stopping = asyncio.create_task(GatewayReplica.__del__(gateway))
        await asyncio.wait_for(asked.wait(), 30)
        async with open_channel(address, stranger) as another:
            answer = await health_pb2_grpc.HealthStub(another).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == SERVING
        succeeded.set_result(None)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await stopping
