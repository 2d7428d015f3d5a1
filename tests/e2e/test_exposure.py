"""What a running cluster shows to other machines and to other users of this one: its gateway, where it is told to."""

import json
import socket
import stat
from pathlib import Path
from urllib.request import urlopen

import grpc
import psutil
import pytest

from tests.e2e.conftest import RunningCluster
from tests.listening import family, is_loopback, listeners

CONNECT_S = 10.0
PACKET_S = 30.0


def processes(cluster: RunningCluster) -> list[psutil.Process]:
    assert cluster.state.ray_pid is not None
    return family(cluster.state.ray_pid)


def other_addresses() -> list[str]:
    """Addresses at which other machines reach this one."""
    found = [address for card in psutil.net_if_addrs().values() for address in card]
    return [at.address for at in found if at.family == socket.AF_INET and not is_loopback(at.address)]


def test_a_cluster_of_one_machine_listens_on_the_loopback_alone(cluster: RunningCluster) -> None:
    """Bug: Ray's processes and Serve's replicas listened on all interfaces, 19 ports of 22."""
    found = list(listeners(processes(cluster)))
    assert len(found) > 8, "a cluster listens on more ports than that"
    assert not [listener for listener in found if not is_loopback(listener[1])]


def test_a_packet_from_another_machine_does_not_reach_ray(cluster: RunningCluster) -> None:
    """Bug: `StartSync` without metadata aborts Ray's GCS and raylet, before they look at the token."""
    ports = [port for _, _, port in listeners(processes(cluster))]
    for address in other_addresses():
        for port in ports:
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=CONNECT_S).close()
        with grpc.insecure_channel(f"{address}:{cluster.state.ray_address.rpartition(':')[2]}") as channel:
            sync = channel.stream_stream("/ray.rpc.syncer.RaySyncer/StartSync")
            with pytest.raises(grpc.RpcError) as refusal:
                list(sync(iter([b""]), timeout=PACKET_S))
            assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
    with cluster.client() as client:
        assert client.cluster_status().nodes


def test_rays_sockets_logs_and_session_files_are_for_this_user_alone(cluster: RunningCluster) -> None:
    """Bug: they lay under /tmp/ray, writable for everybody."""
    closed = (cluster.state_dir / "ray").resolve().parent
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    opened = {
        Path(path)
        for process in processes(cluster)
        for path in [file.path for file in process.open_files()]
        + [connection.laddr for connection in process.net_connections("unix") if connection.laddr]
        if "/session_" in path
    }
    assert {path.name for path in opened} >= {"raylet", "plasma_store", "gcs_server.out"}
    assert not [path for path in opened if not path.is_relative_to(closed)]


def test_prometheus_reads_every_process_of_the_cluster(cluster: RunningCluster) -> None:
    with cluster.client() as client:
        own_address = client.cluster_status().metrics_address

    def read(address: str, path: str) -> str:
        with urlopen(f"http://{address}{path}", timeout=PACKET_S) as answer:
            return str(answer.read().decode())

    places = {place["labels"]["role"]: place["targets"] for place in json.loads(read(own_address, "/targets"))}
    assert sorted(places) == ["decode", "gateway", "prefill"]
    for role, metric in (("gateway", "requests_active"), ("decode", "decode_pages"), ("prefill", "prefill_jobs")):
        (address,) = places[role]
        assert f"colm_{metric}" in read(address, "/metrics")
