"""Ports that are chosen before somebody listens on them."""

import socket
import subprocess
import sys

import pytest

from cluster import ports
from cluster.options import GatewaySection
from cluster.ports import choose_port, steady_ports
from colm.client import DEFAULT_ADDRESS
from colm.errors import ClusterError
from tests.nodes import EVERYWHERE, LOOPBACK

RAYS_WORKERS = range(10_002, 20_000)
CHOOSES = """
from cluster import ports
ports.steady_ports = lambda handed_out: [{port}]
try:
    print(ports.choose_port("127.0.0.1"))
except ports.ClusterError:
    print("none")
"""


def test_a_port_that_is_chosen_ahead_is_none_that_the_kernel_or_ray_gives_away() -> None:
    """Bug: it was one of the kernel's, and any connection that left the machine could take it meanwhile."""
    linux = range(32_768, 61_000)
    steady = steady_ports(linux)
    assert len(steady) > 10_000
    assert not [port for port in steady if port in linux or port in RAYS_WORKERS or not 1024 <= port < 65_536]
    assert steady_ports(range(20_000, 65_530)) == [*range(65_530, 65_536)]
    assert steady_ports(range(1024, 65_536)) == steady_ports(range(0)), "where the kernel leaves none, any will do"


@pytest.mark.parametrize("host", [LOOPBACK, "localhost", EVERYWHERE])
def test_it_is_not_one_of_those_that_the_kernel_hands_out_here(host: str) -> None:
    port = choose_port(host)
    with socket.socket() as asks:
        asks.bind(("127.0.0.1", 0))
        assert asks.getsockname()[1] in ports._handed_out()
    assert port in steady_ports(ports._handed_out())


def test_the_gateways_own_ports_are_none_that_anybody_is_given_by_chance() -> None:
    """Bug: they were 50051 and 50052, which Linux gives to connections that leave, before the gateway has begun."""
    gateway = GatewaySection()
    given = (range(32_768, 61_000), RAYS_WORKERS, *ports._RANGES)
    for port in (gateway.port, gateway.wanted_http_port):
        assert 1024 <= port < 30_000
        assert not [each for each in given if port in each]
    assert f"127.0.0.1:{gateway.port}" == DEFAULT_ADDRESS


def test_two_commands_that_start_at_once_choose_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    port = choose_port("127.0.0.1")
    chosen = subprocess.run([sys.executable, "-c", CHOOSES.format(port=port)], stdout=subprocess.PIPE, check=True)
    assert chosen.stdout == b"none\n"
    monkeypatch.setattr(ports, "steady_ports", lambda _: [port, port - 1 if port % 2 else port + 1])
    assert choose_port("127.0.0.1") != port


def test_a_port_where_somebody_listens_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(ports, "steady_ports", lambda _: [taken.getsockname()[1]])
        with pytest.raises(ClusterError, match=r"no free port was found for '127\.0\.0\.1'"):
            choose_port("127.0.0.1")
