"""A Ray head node of our own on this machine, started and stopped as one process group."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.state import write_private
from colm.errors import ClusterError
from colm.wire.security import new_token

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1


def show_token(token_path: Path) -> None:
    """Let this process, and what it starts, into the Ray of that token.

    Must come before `import ray`, which reads the environment once.

    Raises:
        ClusterError: there is no token at that path.
    """
    if not token_path.is_file():
        raise ClusterError(f"{token_path} is missing, and without it the cluster's Ray lets nobody in")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}


def start_ray(resources: Mapping[str, float], token_path: Path, log_path: Path) -> tuple[str, int]:
    """Start a head node that outlives this process.

    Args:
        resources: custom resources of the node, e.g. {"prefill": 1}.
        token_path: where to put the token that Ray will demand of whoever connects.
        log_path: where Ray's own words go.

    Returns:
        (address to join, pid to stop).

    Raises:
        ClusterError: Ray did not come up; the message ends with its last words.
    """
    write_private(token_path, new_token())
    show_token(token_path)
    port, client_port = free_port(), free_port()
    words = ", ".join(f'"{name}": {amount}' for name, amount in resources.items())
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--port={port}", f"--ray-client-server-port={client_port}"),
        *("--include-dashboard=false", "--disable-usage-stats", f"--resources={{{words}}}"),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    give_up_s = time.monotonic() + _START_TIMEOUT_S
    while "Ray runtime started" not in (words := log_path.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > give_up_s:
            stop_ray(process.pid)
            raise ClusterError(f"Ray did not start; {log_path} ends with: {words[-600:].strip()}")
        time.sleep(_POLL_S)
    address = re.search(rf"--address='([^']+:{port})'", words)
    if address is None:
        stop_ray(process.pid)
        raise ClusterError(f"Ray started but did not say where; see {log_path}")
    return address[1], process.pid


def is_running(pid: int) -> bool:
    """Whether the head node of that pid still lives; a pid that has passed on to a stranger does not count."""
    try:
        head = psutil.Process(pid)
        return head.status() != psutil.STATUS_ZOMBIE and "ray" in " ".join(head.cmdline())
    except psutil.NoSuchProcess:
        return False


def stop_ray(pid: int) -> None:
    """Stop a head node and everything it started; returns when nothing is left. Harmless if it is gone already."""
    if not is_running(pid):
        return
    head = psutil.Process(pid)
    family = [head, *head.children(recursive=True)]
    head.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=_STOP_TIMEOUT_S)
    if os.getpid() != pid:
        _reap(pid)


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # another `colm up` was its parent
        os.waitpid(pid, os.WNOHANG)


def is_port_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
