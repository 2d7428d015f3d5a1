"""The two systems under load, each brought up by a process of its own that takes it down when this one ends.

The process waits at the other end of a pipe, which the kernel closes however this process ends, SIGKILL included. It
has a session of its own, so that Ctrl-C in a terminal reaches this process alone, and the clean-up runs to its end.
"""

import asyncio
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, get_args

import psutil
import torch

from bench.head_of_line.clusters import running
from bench.serving.one_process import serving
from cluster.options import ClusterConfig, load_config
from cluster.security.secret_files import SecretFiles, write_secrets
from cluster.state import ClusterState
from colm.client import Client
from colm.cpus import num_usable_cpus
from colm.errors import ClusterError, ColmError
from colm.nodes import ModelStatus, NodeReport
from colm.wire.security import Security

Name = Literal["disaggregated", "one process"]
NAMES: tuple[Name, ...] = get_args(Name)

READY_TIMEOUT_S = 400.0
"""A cluster has its own, shorter limit, whose error says more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A running system."""

    name: Name
    address: str
    security: Security
    pid: int | None
    """The process whose descendants it is; None of a cluster that joined a Ray which was there."""

    def model(self) -> ModelStatus:
        """What it serves."""
        with Client(self.address, self.security) as client:
            (model,) = client.cluster_status().models
        return model

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Its processes on this machine, by role; what is Ray's own is `ray`."""
        family = [] if self.pid is None else [psutil.Process(self.pid)]
        if self.name == "one process":
            return {self.name: family}
        family += [each for parent in family for each in parent.children(recursive=True)]
        with Client(self.address, self.security) as client:
            reports = [node.report for node in client.cluster_status().nodes]
        return by_role(family, reports)


def by_role(family: Sequence[psutil.Process], reports: Sequence[NodeReport]) -> dict[str, list[psutil.Process]]:
    """Processes by what they are: those that report are nodes, the gateway is known by its title.

    Args:
        family: Ray's head node and all that it started; none where another started it.
        reports: of nodes, which may be on other machines.
    """
    here = {each.process.pid: each.role.value for each in reports if each.process.host == socket.gethostname()}
    roles: dict[str, list[psutil.Process]] = {}
    for process in {*family, *map(psutil.Process, here)}:
        role = here.get(process.pid) or ("gateway" if "gateway" in _title(process) else "ray")
        roles.setdefault(role, []).append(process)
    return roles


def _title(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.NoSuchProcess, IndexError):
        return ""


@contextmanager
def system(name: Name, model: Path, state_dir: Path | None = None) -> Iterator[System]:
    """A system to put under load.

    Args:
        name: which.
        model: what it serves, with the cluster's default options.
        state_dir: of a cluster that runs; it is left running.

    Raises:
        ClusterError: it did not come up, and why; there is no such cluster.
    """
    if name == "disaggregated" and state_dir is not None:
        yield _of(ClusterState.require(state_dir))
        return
    spawn = get_context("spawn")
    mine, theirs = spawn.Pipe()
    serve = _serve_cluster if name == "disaggregated" else serve_one_process
    process = spawn.Process(target=_host, args=(serve, model, theirs), name=f"bench-serving-{name}")
    process.start()
    theirs.close()
    try:
        if not mine.poll(READY_TIMEOUT_S):
            raise ClusterError(f"the system {name!r} was not ready within {READY_TIMEOUT_S:g} s")
        try:
            found = mine.recv()
        except EOFError as err:
            raise ClusterError(f"the process of the system {name!r} ended before it was ready") from err
        if not isinstance(found, System):
            raise ClusterError(f"the system {name!r} did not start: {found}")
        yield found
    finally:
        mine.close()
        process.join()


def _of(state: ClusterState) -> System:
    return System(name="disaggregated", address=state.gateway_address, security=state.security, pid=state.ray_pid)


def _host(serve: Callable[[Path, Connection], None], model: Path, pipe: Connection) -> None:
    """The process: sends its `System`, or what is wrong, and stops it when the pipe is closed."""
    os.setsid()
    torch.set_num_threads(num_usable_cpus())  # as nodes do
    try:
        serve(model, pipe)
    except ColmError as err:
        pipe.send(str(err))


def _wait_until_closed(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        return
    raise AssertionError("nobody sends")


def _serve_cluster(model: Path, pipe: Connection) -> None:
    with running(model, None) as state:
        pipe.send(_of(state))
        _wait_until_closed(pipe)


def serve_one_process(model: Path, pipe: Connection) -> None:
    """Send the `System` of a reference server through the pipe, and serve until its other end is closed."""
    config = load_config(None, {"model.path": model, "gateway.port": 0})
    with tempfile.TemporaryDirectory(prefix="colm-bench-") as folder:
        write_secrets(secrets := Path(folder) / "secrets")
        security = SecretFiles(folder=str(secrets), has_tls=True, has_client_token=True).of_clients()
    asyncio.run(_serve_until_closed(model, config, security, pipe))


async def _serve_until_closed(model: Path, config: ClusterConfig, security: Security, pipe: Connection) -> None:
    tls = security.current_tls
    assert tls is not None
    of_clients = Security(token=security.token, tls=tls.for_clients())
    async with serving(model, config, security) as (address, _):
        pipe.send(System(name="one process", address=address, security=of_clients, pid=os.getpid()))
        await asyncio.to_thread(_wait_until_closed, pipe)
