"""Starts, finds and stops a Ray head node on this machine, with every process that it started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.ports import choose_port
from cluster.state import write_private
from colm.errors import ClusterError
from colm.wire.security import new_token

# Of one try. On a busy machine each of Ray's processes takes seconds to import what it needs.
_START_TIMEOUT_S = 120.0
# Ray itself gives up when its node is not there after 30 s, which cannot be set.
_MOST_STARTS = 3
# A head node without replicas stops in 2 s. One with replicas takes longer, for work that nobody wants any more.
_STOP_GRACE_S = 5.0
_KILL_TIMEOUT_S = 30.0
_POLL_S = 0.1
_LOOPBACK = "127.0.0.1"
# Environment variable of a head node, and so of all that it starts. Its value is the token's path, which is another
# one for each state directory.
_MARK = "COLM_RAY_TOKEN"
_ADDRESS = "ray_current_cluster"
WITHOUT = ("--include-dashboard=false", "--include-log-monitor=false", "--no-monitor")
"""Words of `ray start`: without processes whose work nobody here asks for, each of which takes seconds to start."""
ENVIRONMENT = {
    "RAY_START_HOOK": "cluster.ray_start_hook.prepare",
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_prestart_worker_first_driver": "0",
}
"""Of a head node: it waits for its processes as long as a busy machine may take to start them."""


def prepare_ray() -> None:
    """Set what Ray reads from the environment as it is imported; a user's own settings win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Each try to reach a Ray takes 41 s where nobody answers, and by default there are twenty.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")


def show_token(token_path: Path) -> None:
    """Give this process, and those that it starts, access to the Ray of this machine with that token.

    Must come before `import ray`, which reads the environment once.

    Raises:
        ClusterError: there is no token at that path.
    """
    if not token_path.is_file():
        raise ClusterError(f"{token_path} is missing, and without it the cluster's Ray lets nobody in")
    # The last one makes the loopback the address of this machine, to which Ray's processes and replicas then listen.
    # --node-ip-address does so for some of them.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def start_ray(resources: Mapping[str, float], root: Path, token_path: Path, log_path: Path) -> tuple[str, int]:
    """Start a head node that outlives this process. Even after a failure, `stop_ray` finds it by its token's path.

    All of its processes listen on the loopback alone: before it looks at a token, Ray dies of certain calls.

    Args:
        resources: custom resources of the node, e.g. {"prefill": 1}.
        root: folder for Ray's files, in one that only this user may enter.
        token_path: file for the token that Ray will demand of everybody who connects.
        log_path: file for Ray's output.

    Returns:
        (address to join, pid of the head node).

    Raises:
        ClusterError: Ray did not come up; the message ends with the end of Ray's output.
    """
    write_private(token_path, new_token())
    show_token(token_path)
    for _ in range(_MOST_STARTS):
        (root / _ADDRESS).unlink(missing_ok=True)
        process = _begin_head(resources, root, token_path, log_path)
        if (address := _wait_for_address(process, root)) is not None:
            return address, process.pid
        stop_ray(token_path)
    words = log_path.read_text(errors="replace")
    raise ClusterError(f"Ray did not start; {log_path} ends with: {words[-600:].strip()}")


def _begin_head(
    resources: Mapping[str, float], root: Path, token_path: Path, log_path: Path
) -> "subprocess.Popen[bytes]":
    words = ", ".join(f'"{name}": {amount}' for name, amount in resources.items())
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--node-ip-address={_LOOPBACK}", "--port=0", *port_words()),
        *(f"--temp-dir={root}", *WITHOUT, "--disable-usage-stats", f"--resources={{{words}}}"),
    ]
    with log_path.open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | ENVIRONMENT | mark_of(token_path),
        )


def port_words() -> list[str]:
    """Words of `ray start` about ports. What they do not name listens where the kernel lets it.

    Where a port of an agent is not told, Ray's node waits 15 s for the agent to say it, whatever is set, and dies: on a
    busy machine agents take longer to start. Other ports are not told: whoever binds one first has it.
    """
    agents = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")
    told = dict.fromkeys(("min-worker", "max-worker"), 0) | {name: choose_port(_LOOPBACK) for name in agents}
    return [f"--{name}-port={port}" for name, port in told.items()]


def mark_of(token_path: Path) -> dict[str, str]:
    """Environment by which `stop_ray` finds a node's processes."""
    # SPT_NOENV: processes of Ray's that give themselves a title would write it over the mark.
    return {_MARK: str(token_path.resolve()), "SPT_NOENV": "1"}


def _wait_for_address(process: "subprocess.Popen[bytes]", root: Path) -> str | None:
    """The address of a head's control store, once the head runs; None if it ends or takes too long."""
    give_up_s = time.monotonic() + _START_TIMEOUT_S
    while (address := address_in(root)) is None:
        if process.poll() is not None or time.monotonic() > give_up_s:
            return None
        time.sleep(_POLL_S)
    return address


def address_in(root: Path) -> str | None:
    """The address that a head writes into its folder when it runs; None until then."""
    with suppress(FileNotFoundError):
        return (root / _ADDRESS).read_text() or None
    return None


def is_running(token_path: Path) -> bool:
    """Whether the head node with that token is running."""
    return bool(_heads(_sessions(token_path)))


def is_left(token_path: Path) -> bool:
    """Whether the head node with that token, or any process that it started, is running."""
    return bool(_sessions(token_path))


def stop_ray(token_path: Path) -> None:
    """Stop the head node of that token and everything it started. Harmless if it is gone already.

    Raises:
        ClusterError: a process outlives even SIGKILL.
    """
    known: set[psutil.Process] = set()
    heads = _heads(_sessions(token_path))
    _living(token_path, known)
    _send(signal.SIGTERM, heads)  # a head node then stops its processes in order
    if heads and _ends(token_path, known, _STOP_GRACE_S):
        return
    give_up_s = time.monotonic() + _KILL_TIMEOUT_S
    # Repeated: a process may have started another one just before it was killed.
    while left := _living(token_path, known):
        if time.monotonic() > give_up_s:
            raise ClusterError(f"processes {sorted(process.pid for process in left)} of Ray outlive SIGKILL")
        _send(signal.SIGKILL, left)
        time.sleep(_POLL_S)


def _living(token_path: Path, known: set[psutil.Process]) -> set[psutil.Process]:
    """Processes of a head node that live; `known` remembers them.

    A process that ends loses its environment, the mark included, a moment before it is gone.
    """
    known |= {process for members in _sessions(token_path).values() for process in members}
    return {process for process in known if _lives(process)}


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _sessions(token_path: Path) -> dict[int, list[psutil.Process]]:
    """Running processes of a head node, by session: all processes of the sessions where one carries its mark.

    A mark exists from a process's first moment and needs no pid file. It rules out a stranger with a recycled pid, and
    processes that lost their parent keep it.
    """
    mark = str(token_path.resolve())
    sessions: dict[int, list[psutil.Process]] = {}
    marked: set[int] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            session = os.getsid(process.pid)
            sessions.setdefault(session, []).append(process)
            if process.environ().get(_MARK) == mark:
                marked.add(session)
    return {session: sessions[session] for session in marked}


def _heads(sessions: Mapping[int, list[psutil.Process]]) -> list[psutil.Process]:
    return [process for session, members in sessions.items() for process in members if process.pid == session]


def _send(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _ends(token_path: Path, known: set[psutil.Process], within_s: float) -> bool:
    give_up_s = time.monotonic() + within_s
    while _living(token_path, known):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(_POLL_S)
    return True
