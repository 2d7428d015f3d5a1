"""TCP ports that are chosen before somebody listens on them."""

import random
import socket
from pathlib import Path

from colm.errors import ClusterError
from colm.wire.endpoint import why_not

# Ray takes its workers' ports from 10002 to 19999 by default, Kubernetes those of services from 30000 to 32767.
_RANGES = (range(20_000, 30_000), range(61_000, 65_536))
_MOST_TRIES = 256
# First and last of the ports that the kernel hands out: to connections as they leave, and to whoever binds port 0.
_HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")

_kept: list[socket.socket] = []


def choose_port(host: str) -> int:
    """A free port, for a server that starts later, and comes back there when it is restarted.

    Nobody is given it by chance, and no other process of ours chooses it until this one ends.

    Args:
        host: an address of this machine, or a name for one.

    Raises:
        ClusterError: none was found.
    """
    ports = steady_ports(_handed_out())
    for port in random.sample(ports, min(_MOST_TRIES, len(ports))):
        if _keep(port) and why_not(host, port) is None:
            return port
    raise ClusterError(f"no free port was found for {host!r}; name one in [gateway] port and http_port")


def steady_ports(handed_out: range) -> list[int]:
    """Ports outside those that the kernel hands out and those that others take by default.

    Args:
        handed_out: ports that the kernel hands out. Where it leaves none, it cannot be helped.
    """
    ports = [port for each in _RANGES for port in each]
    return [port for port in ports if port not in handed_out] or ports


def _handed_out() -> range:
    first, last = map(int, _HANDED_OUT.read_text().split())
    return range(first, last + 1)


def _keep(port: int) -> bool:
    """Whether no other process of ours has chosen the port; a name of Linux's, without a file, says that one has."""
    keeper = socket.socket(socket.AF_UNIX)
    try:
        keeper.bind(f"\0colm-serve-port-{port}")
    except OSError:
        keeper.close()
        return False
    _kept.append(keeper)
    return True
