"""A Ray cluster of several nodes: replicas go to nodes with their role's resource, prompts to free replicas."""

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.security.secret_files import write_secrets
from cluster.state import ClusterState, read_joined, write_private
from colm.checkpoint import Checkpoint
from colm.client import Answer, Client, collect
from colm.events import Token
from colm.nodes import Role
from colm.wire.security import new_token
from tests.e2e.conftest import RunningCluster, colm_command, colm_env, last_json, run_colm, until
from tests.e2e.ray_nodes import RayNodes, ray_nodes
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint, tiny_config

PROMPT = list(range(3, 150))

pytestmark = pytest.mark.timeout(900)  # the first test's time has that of three `ray start` and five commands in it


@dataclass(frozen=True)
class TwoNodes:
    """A head, a node for two prefill replicas and one for a decode replica, with a cluster on them."""

    checkpoint: Checkpoint
    node_ids: dict[str, str]
    """Ray's name of the node, by role."""
    too_many: str
    """Output of `colm up` when it was asked for a third prefill replica."""
    running: RunningCluster
    ray: RayNodes


def assert_a_killed_up_is_known_to_down(state_dir: Path, words: tuple[str, ...]) -> None:
    """Bug: whatever a killed `up` had placed on a joined Ray stayed there, and `down` did not know of it."""
    up = subprocess.Popen(colm_command("up", *words), env=colm_env(state_dir), stderr=subprocess.DEVNULL)
    until(lambda: read_joined(state_dir) is not None, 60)
    up.kill()
    up.wait()
    refused = run_colm(state_dir, "up", *words, check=False)
    assert (refused.returncode, "run `colm down` first" in refused.stderr) == (1, True)
    run_colm(state_dir, "down")


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("two-nodes")
    checkpoint = tiny_checkpoint(folder / "tiny", tiny_config(max_context=32768, num_layers=4))
    config = folder / "colm.toml"
    text = '[model]\ndtype = "float32"\n[gateway]\nport = 0\n[decode]\nkv_cache_bytes = "256MiB"\n'
    config.write_text(text)
    other = folder / "other.toml"
    other.write_text(f'{text}resource = "other"\n[prefill]\nresource = "other"\n[ray]\napplication = "other"\n')
    state_dir = folder / "state"
    write_secrets(folder / "secrets")
    with (
        ray_nodes({"prefill": 2}, {"decode": 1, "other": 2}, demands_token=True) as nodes,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in nodes.environment.items():
            patch.setenv(name, value)
        carriers = nodes.ids()
        ids = {role: carriers[role] for role in ("prefill", "decode")}
        words = ("--model", str(checkpoint.path), "--ray-address", nodes.address, "--secrets", str(folder / "secrets"))
        of_config = ("--config", str(config))
        too_many = run_colm(state_dir, "up", *of_config, *words, "--prefill", "3", check=False)
        assert too_many.returncode == 1
        run_colm(state_dir, "up", *of_config, *words, "--prefill", "2")
        try:
            # What runs must not notice: all tests are of a Ray that another cluster has shared.
            assert_a_killed_up_is_known_to_down(folder / "beside", ("--config", str(other), *words))
            running = RunningCluster(state_dir, ClusterState.require(state_dir))
            yield TwoNodes(checkpoint, ids, too_many.stderr, running, nodes)
        finally:
            run_colm(state_dir, "down")
        assert ClusterState.read(state_dir) is None


def ask(client: Client, token_ids: list[int]) -> Answer:
    return collect(client.generate(token_ids=token_ids, num_chains=3, max_new_tokens=8))


def test_replicas_go_to_the_node_that_carries_their_role(two_nodes: TwoNodes) -> None:
    assert "resource 'prefill'" in two_nodes.too_many
    status = last_json(two_nodes.running.colm("status", "--json").stdout)
    assert sorted(node["role"] for node in status["nodes"]) == ["decode", "prefill", "prefill"]
    assert {node["role"]: node["ray_node_id"] for node in status["nodes"]} == two_nodes.node_ids
    with two_nodes.running.client() as client:
        answer = ask(client, PROMPT)
    assert_greedy(two_nodes.checkpoint.load(), PROMPT, [token.token_id for token in answer.tokens], 3)


def test_short_prompts_do_not_wait_behind_long_ones_though_every_replica_computes_one(two_nodes: TwoNodes) -> None:
    """Bug: a short prompt waited for the end of the long one that its replica computed."""
    has_token = threading.Event()
    may_end = threading.Event()

    def hold(client: Client, first: int) -> None:
        """A prompt that begins like no other: two that begin alike share a prefill."""
        events = client.generate(token_ids=[(first + number) % 320 for number in range(20_000)], max_new_tokens=8)
        for event in events:
            if isinstance(event, Token):
                has_token.set()
            if may_end.is_set():
                events.close()

    def num_prefilling() -> list[int]:
        return sorted(node.num_active_requests for node in two_nodes.running.nodes(Role.PREFILL))

    with two_nodes.running.client() as client, ThreadPoolExecutor() as threads:
        longs = []
        # Serve prefers the replica with fewer calls, by what it last heard of them.
        while 0 in num_prefilling() and len(longs) < 4:
            longs.append(threads.submit(hold, client, len(longs)))
            until(lambda: sum(num_prefilling()) == len(longs), 60)
        assert 0 not in num_prefilling()
        shorts = [threads.submit(ask, client, PROMPT) for _ in range(4)]
        answers = [short.result() for short in shorts]
        assert not has_token.is_set(), "a long prompt was answered before a short one"
        may_end.set()
        for held in longs:
            held.result()
    assert len({tuple(token.token_id for token in answer.tokens) for answer in answers}) == 1
    two_nodes.running.assert_idle()


def test_a_stranger_is_refused_by_every_node_and_by_up(two_nodes: TwoNodes, tmp_path: Path) -> None:
    """Without the token, or with a wrong one."""
    words = ("up", "--model", str(two_nodes.checkpoint.path), "--ray-address", two_nodes.ray.address)
    write_secrets(tmp_path / "secrets")
    write_private(tmp_path / "wrong", new_token())
    for environment in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            stranger = run_colm(tmp_path / "state", *words, "--secrets", str(tmp_path / "secrets"), check=False)
        assert stranger.returncode == 1
        assert "error: cannot join Ray" in stranger.stderr
        assert "Traceback" not in stranger.stderr


def test_what_ray_keeps_of_a_running_cluster_holds_no_secret(two_nodes: TwoNodes) -> None:
    """Bug: Serve's controller had written the TLS key and both tokens into Ray's key-value store."""
    secrets = [path.read_bytes() for path in (two_nodes.running.state_dir.parent / "secrets").iterdir()]
    kept = two_nodes.ray.kept()
    assert b"PrefillOptions" in kept, "the store holds the application"
    assert not [secret for secret in secrets if secret in kept]
    assert b"PRIVATE KEY" not in kept
