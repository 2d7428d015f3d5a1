"""How a head node of Ray is started, without one: a small program stands for it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster import local_ray
from cluster.local_ray import ENVIRONMENT, is_left, is_running, port_words, start_ray, stop_ray
from colm.errors import ClusterError

FAILS = "print('no node within 30 s', flush=True)"
RUNS = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('127.0.0.1:4711'); time.sleep(600)"

Heads = Callable[..., list[int]]


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Heads:
    """Lets programs stand for the head nodes that are started, one after another; returns the list of their pids."""

    def stand_in(*programs: str) -> list[int]:
        pids: list[int] = []

        def begin(_resources: object, root: Path, token_path: Path, log_path: Path) -> "subprocess.Popen[bytes]":
            with log_path.open("wb") as log:
                begun = subprocess.Popen(
                    [sys.executable, "-c", programs[len(pids)], str(root / "ray_current_cluster")],
                    stdout=log,
                    env=os.environ | local_ray.mark_of(token_path),
                    start_new_session=True,
                )
            pids.append(begun.pid)
            return begun

        monkeypatch.setattr(local_ray, "_begin_head", begin)
        return pids

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")  # start_ray sets them in this process, and this takes them back
    return stand_in


def test_a_ray_that_did_not_come_up_is_started_again(heads: Heads, tmp_path: Path) -> None:
    """Bug: on a busy machine Ray's node was not there after Ray's own 30 s, and `up` failed."""
    token_path, log_path = tmp_path / "token", tmp_path / "ray.log"
    pids = heads(FAILS, RUNS)
    assert start_ray({}, tmp_path, token_path, log_path) == ("127.0.0.1:4711", pids[-1])
    assert len(pids) == 2
    assert is_running(token_path)
    stop_ray(token_path)
    assert not is_left(token_path)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_it_is_started_three_times_at_most_and_the_error_ends_with_what_ray_said(heads: Heads, tmp_path: Path) -> None:
    pids = heads(*[FAILS] * 4)
    with pytest.raises(ClusterError, match=r"Ray did not start; .*ray\.log ends with: no node within 30 s"):
        start_ray({}, tmp_path, tmp_path / "token", tmp_path / "ray.log")
    assert len(pids) == 3
    assert not is_left(tmp_path / "token")


def test_rays_node_is_told_each_port_that_it_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: Ray's node waited 15 s for each port that an agent of its own chose, and died; so it did not start where
    agents took longer.
    """
    from ray._common.utils import load_class
    from ray._private import ray_constants, services
    from ray._private.parameter import RayParams
    from ray.scripts import scripts

    words = dict(word.removeprefix("--").split("=") for word in port_words())
    assert {f"--{name}" for name in words} <= {flag for option in scripts.start.params for flag in option.opts}
    assert words.pop("min-worker-port") == words.pop("max-worker-port") == "0"
    assert len(set(words.values())) == 4
    told: list[list[str]] = []
    monkeypatch.setattr(services, "start_ray_process", lambda command, *_, **__: told.append(command))
    params = RayParams(ray_client_server_port=10001, dashboard_agent_listen_port=words["dashboard-agent-listen-port"])
    load_class(ENVIRONMENT[ray_constants.RAY_START_HOOK])(params, True)
    assert params.ray_client_server_port is None
    for process in (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER):
        services.start_ray_process(["program"], process, fate_share=True)
    port = words["dashboard-agent-listen-port"]
    assert told == [["program", f"--dashboard_agent_listen_port={port}"], ["program"]]
    raylet = subprocess.run([services.RAYLET_EXECUTABLE, "--help"], stdout=subprocess.PIPE, text=True, check=False)
    waited_for = {"metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"}
    assert not [flag for flag in waited_for if f"-{flag} (" not in raylet.stdout]


@pytest.mark.parametrize(("set_by_user", "tries"), [("", "2"), ("5", "5")])
def test_a_ray_that_does_not_answer_is_given_up_after_two_tries(set_by_user: str, tries: str) -> None:
    """Bug: `up` asked a Ray that had ended for 13 minutes: 20 tries of 41 s, each with the same two lines."""
    program = "from cluster.local_ray import prepare_ray as p; p(); from ray._private import ray_constants as c"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_NUM_REDIS_GET_RETRIES"}
    environment |= {"RAY_NUM_REDIS_GET_RETRIES": set_by_user} if set_by_user else {}
    command = [sys.executable, "-c", f"{program}; print(c.NUM_REDIS_GET_RETRIES)"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == f"{tries}\n"
