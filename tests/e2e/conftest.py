"""Real clusters, brought up and taken down by the `colm` command itself."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import Client
from colm.nodes import NodeReport, Role

_COMMAND_TIMEOUT_S = 280
AS_NICE_AS_TESTS = {"RAY_worker_niceness": "0"}
"""For whoever starts Ray: by default its workers, and so all replicas, wait behind every other test of `make test`."""


@dataclass(frozen=True)
class RunningCluster:
    """A cluster of this test session."""

    state_dir: Path
    state: ClusterState

    def colm(self, *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        return run_colm(self.state_dir, *words, **options)

    def client(self) -> Client:
        return Client(self.state.gateway_address, self.state.security)

    def nodes(self, role: Role) -> list[NodeReport]:
        with self.client() as client:
            reports = [node.report for node in client.cluster_status().nodes]
        return [report for report in reports if report.role is role]

    def assert_idle(self) -> None:
        """Before long, no request, page or lease is left anywhere."""

        def busy() -> list[str]:
            with self.client() as client:
                status = client.cluster_status()
            held = [f"gateway: {status.num_active_requests} requests"] if status.num_active_requests else []
            return held + [str(node.report) for node in status.nodes if holds(node.report)]

        until(lambda: not busy(), 60, lambda: f"still held: {busy()}")


def holds(node: NodeReport) -> bool:
    return bool(node.num_active_requests or node.num_queued_requests or node.num_leases or node.num_pages_used)


def run_colm(state_dir: Path, *words: str, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        colm_command(*words),
        env=colm_env(state_dir),
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
        **options,
    )
    assert not check or done.returncode == 0, f"colm {' '.join(words)}:\n{done.stdout}\n{done.stderr}"
    return done


def colm_command(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("colm")), *words]


def colm_env(state_dir: Path) -> dict[str, str]:
    return os.environ | AS_NICE_AS_TESTS | {"COLM_STATE_DIR": str(state_dir)}


def last_json(stdout: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(stdout.rstrip("\n").splitlines()[-1])
    return record


def until(condition: Callable[[], bool], within_s: float, complaint: Callable[[], str] = lambda: "too late") -> float:
    """Wait until the condition holds; returns the seconds it took."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < within_s, complaint()
        time.sleep(0.05)
    return time.monotonic() - started_s


@pytest.fixture(scope="session")
def expanded_model() -> Path:
    """SmolLM2 with a second chain, as `make model` makes it."""
    path = Path(__file__).parent.parent.parent / "models" / "SmolLM2-135M-Instruct-9-3"
    if not (path / "config.json").exists():
        pytest.fail(f"{path.name} is missing; run `make model`", pytrace=False)
    return path


@pytest.fixture(scope="session")
def expanded_checkpoint(expanded_model: Path) -> Checkpoint:
    return Checkpoint.open(expanded_model)


@pytest.fixture(scope="session")
def cluster(expanded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """One prefill and one decode replica of the real model, in float32 so that answers equal the oracle's."""
    folder = tmp_path_factory.mktemp("cluster")
    config = folder / "colm.toml"
    config.write_text(
        '[model]\ndtype = "float32"\n[gateway]\nport = 0\nmax_document_bytes = "6MiB"\n'
        # Each test's prompt is brought, whatever was asked before.
        '[decode]\nkv_cache_bytes = "2GiB"\nprefix_cache_bytes = 0\n'
        f'[tracing]\nfolder = "{folder / "traces"}"\n'
    )
    state_dir = folder / "state"
    run_colm(state_dir, "up", "--config", str(config), "--model", str(expanded_model))
    state = ClusterState.require(state_dir)
    assert state.ray_pid is not None
    family = [psutil.Process(state.ray_pid), *psutil.Process(state.ray_pid).children(recursive=True)]
    try:
        yield RunningCluster(state_dir, state)
        family += psutil.Process(state.ray_pid).children(recursive=True)
    finally:
        run_colm(state_dir, "down")
    left = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"`colm down` left {left}"
    assert ClusterState.read(state_dir) is None
