"""`colm up` and `colm down` as processes: however they end, `down` finds everything that is left running."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.state import ClusterState
from colm.wire.endpoint import dial_address
from tests.e2e.conftest import colm_command, colm_env, last_json, run_colm, until
from tests.listening import is_loopback, listeners
from tests.nodes import EVERYWHERE
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.timeout(900)  # on a busy machine Ray may be started three times
STARTING, LOADING = "starting Ray", "loading"
# An interrupted `up` has only a Ray to stop; the limit is far above the time that takes.
CLEAN_UP_S = 180


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lifecycle")
    path = folder / "colm.toml"
    path.write_text(
        f'[model]\ndtype = "float32"\npath = "{tiny_checkpoint(folder / "tiny").path}"\n'
        f'[gateway]\nport = 0\nhost = "{EVERYWHERE}"\n[decode]\nkv_cache_bytes = "64MiB"\n'
    )
    return path


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A cluster's state directory; processes that a failing test leaves behind are killed."""
    path = tmp_path / "state"
    yield path
    for process in processes_of(path):
        process.kill()


def processes_of(state_dir: Path) -> set[psutil.Process]:
    """Processes whose environment or command line names the directory, and all that descend from them."""
    found = set()
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
            if any(str(state_dir) in word for word in told):
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:
            continue
    return {process for process in found if is_alive(process)}


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def assert_nothing_left(state_dir: Path, seen: set[psutil.Process]) -> None:
    left = {process for process in seen if is_alive(process)} | processes_of(state_dir)
    assert not left, f"left running: {left}"
    assert ClusterState.read(state_dir) is None
    assert not (state_dir / "ray_token").exists()


def begin_up(state_dir: Path, config: Path, moment: str) -> "tuple[subprocess.Popen[str], set[psutil.Process]]":
    """Start `colm up` and wait until it has come to a moment and its Ray runs; returns it and all its processes."""
    up = subprocess.Popen(
        colm_command("up", "--config", str(config)), env=colm_env(state_dir), stderr=subprocess.PIPE, text=True
    )
    assert up.stderr is not None
    assert any(line.startswith(moment) for line in up.stderr), "ended before it came there"
    until(lambda: any("gcs_server" in process.name() for process in processes_of(state_dir)), 60)
    return up, processes_of(state_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_nothing_and_says_so_in_one_line(
    state_dir: Path, config: Path, number: signal.Signals
) -> None:
    """Bug: Ray has a session of its own; an `up` interrupted while it waited left Ray running, unknown to `down`."""
    up, seen = begin_up(state_dir, config, LOADING)
    up.send_signal(number)
    _, stderr = up.communicate(timeout=CLEAN_UP_S)
    assert_nothing_left(state_dir, seen)
    ours = [line for line in stderr.splitlines() if "SIGTERM" not in line and "@  " not in line]  # Ray may have its say
    assert (up.returncode, ours) == (130, ["interrupted; nothing is left running"])


def test_a_second_ctrl_c_does_not_break_the_clean_up_off(state_dir: Path, config: Path) -> None:
    up, seen = begin_up(state_dir, config, STARTING)

    def has_ended() -> bool:
        up.send_signal(signal.SIGINT)
        return up.poll() is not None

    until(has_ended, CLEAN_UP_S)
    _, stderr = up.communicate()
    assert_nothing_left(state_dir, seen)
    assert (up.returncode, stderr) == (130, "interrupted; nothing is left running\n")


def test_down_stops_what_a_killed_up_left(state_dir: Path, config: Path) -> None:
    """Bug: the pid of Ray was written down only after everything was up."""
    up, seen = begin_up(state_dir, config, STARTING)
    up.kill()
    up.communicate()
    assert run_colm(state_dir, "down").stderr.endswith("down\n")
    assert_nothing_left(state_dir, seen)
    assert "no cluster is up" in run_colm(state_dir, "down").stderr


def test_up_replaces_what_a_killed_up_left_and_down_survives_a_ray_that_died(state_dir: Path, config: Path) -> None:
    up, left = begin_up(state_dir, config, LOADING)
    up.kill()
    up.communicate()
    words = ("up", "--config", str(config))
    run_colm(state_dir, *words)
    assert not [process for process in left if is_alive(process)]
    again = run_colm(state_dir, *words, check=False)
    assert (again.returncode, "up with these options already" in again.stderr) == (0, True)
    status = last_json(run_colm(state_dir, "status", "--json").stdout)
    assert sorted(node["role"] for node in status["nodes"]) == ["decode", "prefill"]
    assert status["gateway_address"].startswith(dial_address(EVERYWHERE, 0)[:-1])
    seen = processes_of(state_dir)
    exposed = {port for _, address, port in listeners(seen) if not is_loopback(address)}
    gateway = {
        int(url.rpartition(":")[2]) for url in (status["gateway_address"], status["base_url"].removesuffix("/v1"))
    }
    assert exposed == gateway, "the gateway was told to, and nobody else"
    ray_pid = ClusterState.require(state_dir).ray_pid
    assert ray_pid is not None
    os.kill(ray_pid, signal.SIGKILL)
    run_colm(state_dir, "down")
    assert_nothing_left(state_dir, seen)


def test_a_deploy_that_fails_leaves_nothing(state_dir: Path, config: Path, tmp_path: Path) -> None:
    hopeless = tmp_path / "hopeless.toml"
    hopeless.write_text(config.read_text() + "[ray]\nready_timeout_s = 0.5\n")
    failed = run_colm(state_dir, "up", "--config", str(hopeless), check=False)
    assert_nothing_left(state_dir, set())
    (error,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert failed.returncode == 1
    assert "ray.ready_timeout_s=0.5" in error
    assert "Traceback" not in failed.stderr
