"""Processes that die and callers that leave, on the real cluster."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest

from colm.client import Answer, Client, collect
from colm.events import Event, PrefillProgress, Queued, Reconnecting, Token, Usage, WaitsFor
from colm.nodes import NodeReport, Role
from colm.sampling import SamplingParams
from tests.e2e.conftest import RunningCluster, colm_command, colm_env, holds, until

DOCUMENT = topics["with"] + topics["try"]
PROMPT = "What does the with statement do?"


@pytest.fixture
def client(cluster: RunningCluster) -> Client:
    with cluster.client() as client:
        yield client
    cluster.assert_idle()


def prefilling(event: Event) -> bool:
    return isinstance(event, PrefillProgress) and event.num_tokens_done > 0


def kill(cluster: RunningCluster, role: Role) -> int:
    (node,) = cluster.nodes(role)
    os.kill(node.process.pid, signal.SIGKILL)
    return node.process.pid


def gateway_process(cluster: RunningCluster) -> psutil.Process:
    assert cluster.state.ray_pid is not None
    family = psutil.Process(cluster.state.ray_pid).children(recursive=True)
    (gateway,) = (process for process in family if "ServeReplica:colm:gateway" in " ".join(process.cmdline()))
    return gateway


def test_a_prefill_replica_killed_in_mid_stream_costs_time_but_not_the_answer(
    cluster: RunningCluster, client: Client
) -> None:
    document = f"First.\n{DOCUMENT}"  # no other test's: a prefill node keeps what it has computed
    killed = None
    events = []
    for event in client.generate(document, PROMPT, max_new_tokens=12, timeout_s=120):
        events.append(event)
        if killed is None and prefilling(event):
            killed = kill(cluster, Role.PREFILL)
    answer = collect(events)
    undisturbed = collect(client.generate(document, PROMPT, max_new_tokens=12))
    assert killed is not None
    assert [t.token_id for t in answer.tokens] == [t.token_id for t in undisturbed.tokens]
    assert answer.finished.usage.num_kv_streams >= 2
    until(lambda: killed not in [node.process.pid for node in cluster.nodes(Role.PREFILL)], 60)


def test_a_decode_replica_killed_in_mid_answer_costs_time_but_not_the_answer(
    cluster: RunningCluster, client: Client
) -> None:
    """Its prompt is fetched again, not computed again, and each token is delivered once, as without the fault."""
    drawn = SamplingParams(temperature=0.8, seed=5, ignore_eos=True)
    undisturbed = collect(client.generate(DOCUMENT[:4000], PROMPT, max_new_tokens=60, sampling=drawn))
    events = []
    for event in client.generate(DOCUMENT[:4000], PROMPT, max_new_tokens=60, sampling=drawn, timeout_s=120):
        events.append(event)
        if isinstance(event, Token) and len([e for e in events if isinstance(e, Token)]) == 3:
            kill(cluster, Role.DECODE)
    answer = collect(events)
    assert [t.token_id for t in answer.tokens] == [t.token_id for t in undisturbed.tokens]
    assert answer.text == undisturbed.text
    assert Queued(waits_for=WaitsFor.DECODE_NODE, num_ahead=0) in events
    assert answer.finished.usage.num_decode_nodes == 2
    assert answer.finished.usage.num_prefill_cached_tokens == answer.finished.usage.num_prefill_tokens > 0
    assert answer.finished.usage.num_new_tokens == 60


def test_a_gateway_killed_in_mid_answer_costs_time_but_not_the_answer(cluster: RunningCluster, client: Client) -> None:
    drawn = SamplingParams(temperature=0.8, seed=5, ignore_eos=True)
    options = {"max_new_tokens": 100, "sampling": drawn, "timeout_s": 120}
    undisturbed = collect(client.generate("", "Tell me a long story.", **options))
    events = []
    for event in client.generate("", "Tell me a long story.", **options):
        events.append(event)
        if isinstance(event, Token) and len([e for e in events if isinstance(e, Token)]) == 3:
            gateway_process(cluster).kill()
    answer = collect(events)
    assert [t.token_id for t in answer.tokens] == [t.token_id for t in undisturbed.tokens]
    assert answer.text == undisturbed.text
    assert any(isinstance(event, Reconnecting) for event in events)
    assert without_circumstances(answer) == without_circumstances(undisturbed)


def without_circumstances(answer: Answer) -> Usage:
    """How many tokens are drafted follows from what steps take, how many are kept from who came before."""
    return replace(answer.finished.usage, num_draft_tokens=0, num_accepted_tokens=0, num_prefill_cached_tokens=0)


def test_ctrl_c_stops_the_work_on_all_three_processes(cluster: RunningCluster, tmp_path: Path) -> None:
    """No node begins to decode: the work that would follow the prefill for seconds never begins."""
    document = tmp_path / "document.txt"
    document.write_text(f"Not kept.\n{DOCUMENT}")
    submit = subprocess.Popen(
        colm_command("submit", str(document), "--prompt", PROMPT, "--max-new-tokens", "4000"),
        env=colm_env(cluster.state_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: any(node.num_active_requests for node in cluster.nodes(Role.PREFILL)), 60)
    submit.send_signal(signal.SIGINT)
    decoding: list[NodeReport] = []

    def is_idle() -> bool:
        nodes = [node for role in Role for node in cluster.nodes(role)]
        decoding.extend(node for node in nodes if node.role is Role.DECODE and node.num_active_requests)
        return not any(map(holds, nodes))

    until(is_idle, 60)
    assert decoding == []
    cluster.assert_idle()
    stdout, stderr = submit.communicate(timeout=60)
    assert submit.returncode == 130
    assert "cancelled" in stderr
    assert "Traceback" not in stdout + stderr


def test_a_client_that_stops_reading_an_answer_frees_its_decode_node(cluster: RunningCluster, client: Client) -> None:
    # Longer than the minute within which the node must be idle.
    endless = SamplingParams(ignore_eos=True)
    events = client.generate("", "Tell me a long story.", max_new_tokens=8000, sampling=endless)
    next(event for event in events if isinstance(event, Token))
    events.close()
    cluster.assert_idle()
