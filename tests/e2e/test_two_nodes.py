"""On a Ray cluster of two nodes, each role's replicas go where its resource is."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.state import ClusterState, read_joined
from colm.client import Client, collect
from tests.e2e.conftest import colm_command, colm_env, last_json, run_colm, until
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint

PROMPT = list(range(3, 150))


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, str]]]:
    """(address, Ray node id by role) of a head, a prefill node and a decode node."""
    monkeypatch.setitem(os.environ, "RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        ids = {role: nodes.add_node(num_cpus=1, resources={role: 1}).node_id for role in ("prefill", "decode")}
        yield nodes.address, ids
    finally:
        nodes.shutdown()


def assert_a_killed_up_is_known_to_down(state_dir: Path, words: tuple[str, ...]) -> None:
    """Bug: what it had placed on a Ray that it joined stayed there, and `down` knew of nothing."""
    up = subprocess.Popen(colm_command("up", *words), env=colm_env(state_dir), stderr=subprocess.DEVNULL)
    until(lambda: read_joined(state_dir) is not None, 60)
    up.kill()
    up.wait()
    refused = run_colm(state_dir, "up", *words, check=False)
    assert (refused.returncode, "run `colm down` first" in refused.stderr) == (1, True)
    run_colm(state_dir, "down")


def test_replicas_go_to_the_node_that_carries_their_role(
    ray_cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, node_ids = ray_cluster
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    config = tmp_path / "colm.toml"
    config.write_text('[model]\ndtype = "float32"\n[gateway]\nport = 0\n[decode]\nkv_cache = "64MiB"\n')
    state_dir = tmp_path / "state"
    words = ("--config", str(config), "--model", str(checkpoint.path), "--ray-address", address)
    too_many = run_colm(state_dir, "up", *words, "--prefill", "2", check=False)
    assert too_many.returncode == 1
    assert "resource 'prefill'" in too_many.stderr
    assert_a_killed_up_is_known_to_down(state_dir, words)
    run_colm(state_dir, "up", *words)
    status = last_json(run_colm(state_dir, "status", "--json").stdout)
    assert {node["role"]: node["ray_node_id"] for node in status["nodes"]} == node_ids
    state = ClusterState.require(state_dir)
    with Client(state.gateway_address, state.security) as client:
        answer = collect(client.generate(token_ids=PROMPT, num_chains=3, max_new_tokens=8))
    assert_greedy(checkpoint.load(), PROMPT, [token.token_id for token in answer.tokens], 3)
    run_colm(state_dir, "down")
    assert ClusterState.read(state_dir) is None
