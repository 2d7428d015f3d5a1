"""A prefill replica that is lost, or replaced, gets a document's beginning from the decode replica that holds it."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.scrape import scrape
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import Answer, Client, collect
from colm.defaults import TILE_TOKENS
from colm.kv import KvFormat
from colm.nodes import NodeReport, Role
from colm.sampling import SamplingParams
from tests.e2e.conftest import RunningCluster, last_json, run_colm, until
from tests.tiny import tiny_checkpoint, tiny_config

NUM_SHARED = 3 * TILE_TOKENS
NUM_BEHIND = 5
"""Tokens of a document that fill no block."""
QUESTION, NEXT_QUESTION, LAST_QUESTION = [7, 8, 9], [17, 18, 19, 20, 21], [27, 28]
pytestmark = pytest.mark.timeout(900)  # the first test's time has that of `colm up` in it
GREEDY = SamplingParams(ignore_eos=True)


def options(folder: Path, *, max_queued_s: float) -> str:
    path = folder / "colm.toml"
    path.write_text(
        f'[model]\ndtype = "float32"\npath = "{folder / "model"}"\n[gateway]\nport = 0\n'
        f'[prefill]\nmax_queued_s = {max_queued_s}\n[decode]\nkv_cache_bytes = "64MiB"\n'
    )
    return str(path)


def prefill(cluster: RunningCluster) -> NodeReport | None:
    """The prefill replica, where there is just one."""
    nodes = cluster.nodes(Role.PREFILL)
    return nodes[0] if len(nodes) == 1 else None


def kill(_: RunningCluster, node: NodeReport) -> None:
    os.kill(node.process.pid, signal.SIGKILL)


def change(cluster: RunningCluster, _: NodeReport) -> None:
    said = cluster.colm("up", "--config", options(cluster.state_dir.parent, max_queued_s=3500.0)).stderr
    assert "prefill.max_queued_s: 3400.0 -> 3500.0" in said


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose keys and values are small beside the work for them: on any machine they are moved."""
    config = tiny_config(chains=(8, 4), num_kv_heads=1, num_layers=4, hidden_dim=12 * 1024, max_context=4096)
    return tiny_checkpoint(tmp_path_factory.mktemp("uplink") / "model", config)


@pytest.fixture(scope="module")
def cluster(checkpoint: Checkpoint) -> Iterator[RunningCluster]:
    state_dir = checkpoint.path.parent / "state"
    run_colm(state_dir, "up", "--config", options(state_dir.parent, max_queued_s=3400.0))
    try:
        yield RunningCluster(state_dir, ClusterState.require(state_dir))
    finally:
        run_colm(state_dir, "down")


def ask(client: Client, token_ids: list[int]) -> Answer:
    return collect(client.generate(token_ids=token_ids, max_new_tokens=8, sampling=GREEDY))


def ids_of(answer: Answer) -> list[int]:
    return [token.token_id for token in answer.tokens]


def sample(node: NodeReport, name: str, **labels: str) -> float:
    read = scrape(node.metrics_address)
    assert read is not None
    return read.samples[name, frozenset(labels.items())]


@pytest.mark.parametrize("lose", [kill, change], ids=["killed", "replaced"])
def test_a_document_is_not_computed_again_where_the_prefill_replica_is_another_one(
    cluster: RunningCluster,
    checkpoint: Checkpoint,
    lose: Callable[[RunningCluster, NodeReport], None],
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    document = np.random.default_rng(len(name)).integers(3, 320, NUM_SHARED + NUM_BEHIND).tolist()
    # Clients share nothing of what they ask: this one's question is computed as if nobody had asked before.
    token = last_json(cluster.colm("token", "create", name, "--json").stdout)["token"]
    alone = replace(cluster.state.security, token=token)
    with cluster.client() as client, Client(cluster.state.gateway_address, alone) as stranger:
        plain = ask(stranger, document + NEXT_QUESTION)
        ask(client, document + QUESTION)
        lost = prefill(cluster)
        assert lost is not None
        lose(cluster, lost)
        until(lambda: (node := prefill(cluster)) is not None and node.process.pid != lost.process.pid, 120)
        answer = ask(client, document + NEXT_QUESTION)
        again = ask(client, document + LAST_QUESTION)
    cluster.assert_idle()
    fresh = prefill(cluster)
    assert fresh is not None
    token_bytes = KvFormat.of(checkpoint.config, torch.float32).token_bytes
    usage = answer.finished.usage
    assert ids_of(answer) == ids_of(plain)
    assert plain.finished.usage.num_cached_tokens == 0
    assert usage.num_cached_tokens == NUM_SHARED
    assert again.finished.usage.num_cached_tokens == NUM_SHARED
    num_rest = NUM_BEHIND + len(NEXT_QUESTION) - 1
    assert usage.kv_received_bytes == num_rest * token_bytes
    # Once, for both questions.
    assert sample(fresh, "colm_prefix_uplinks_ended_total", outcome="complete") == 1
    assert sample(fresh, "colm_prefix_uplink_tokens_total") == NUM_SHARED
    assert sample(fresh, "colm_prefix_uplink_bytes_total") == NUM_SHARED * token_bytes
    num_computed = num_rest + NUM_BEHIND + len(LAST_QUESTION) - 1
    assert sample(fresh, "colm_prefill_tokens_total") == num_computed
