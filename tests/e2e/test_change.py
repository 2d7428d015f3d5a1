"""`colm up` on a cluster that is up: its options and its model change, and no request fails."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from openai import DefaultHttpxClient, OpenAI

from cluster.state import ClusterState
from colm.client import Client, collect
from colm.errors import UnknownModel
from colm.nodes import PoolStatus, Role
from colm.sampling import SamplingParams
from tests.e2e.conftest import RunningCluster, run_colm, until
from tests.tiny import fine_tuned, tiny_checkpoint

PROMPT = list(range(3, 200))
GREEDY = SamplingParams(ignore_eos=True)


def toml(folder: Path, name: str, *, batch: int, requests: int = 64, model: str = "tiny", rest: str = "") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(
        f'[model]\ndtype = "float32"\npath = "{folder / model}"\nname = "tiny"\n'
        f"[gateway]\nport = 0\nmax_requests = {requests}\n"
        f'[decode]\nkv_cache_bytes = "64MiB"\nmax_batch_size = {batch}\n{rest}'
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("change")
    tiny_checkpoint(folder / "tiny")
    fine_tuned(folder / "tuned", tiny_checkpoint(folder / "next", seed=1))
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[RunningCluster]:
    state_dir = folder / "state"
    run_colm(state_dir, "up", "--config", str(toml(folder, "first", batch=4)))
    try:
        yield RunningCluster(state_dir, ClusterState.require(state_dir))
    finally:
        run_colm(state_dir, "down")


def pids(cluster: RunningCluster) -> dict[Role, set[int]]:
    return {role: {node.process.pid for node in cluster.nodes(role)} for role in Role}


@dataclass
class Asked:
    """Answers to clients that ask all the time."""

    grpc: list[tuple[int, ...]] = field(default_factory=list)
    http: list[tuple[int, ...]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def asking(cluster: RunningCluster) -> Iterator[Asked]:
    """Two clients over gRPC and one over HTTP, until the block ends."""
    asked, is_over, state = Asked(), threading.Event(), cluster.state
    trusted = ssl.create_default_context(cafile=state.ca_file)

    def ask() -> None:
        with Client(state.gateway_address, state.security) as client:
            while not is_over.is_set():
                events = client.generate(token_ids=PROMPT, max_new_tokens=40, sampling=GREEDY)
                asked.grpc.append(tuple(token.token_id for token in collect(events).tokens))

    def ask_over_http() -> None:
        # By default it tries again where a connection is closed as it sends.
        http = DefaultHttpxClient(verify=trusted)
        with OpenAI(base_url=state.base_url, api_key=state.client_token, http_client=http) as client:
            while not is_over.is_set():
                answer = client.completions.create(
                    model="tiny",
                    prompt=PROMPT,
                    max_tokens=40,
                    temperature=0,
                    logprobs=1,
                    extra_body={"ignore_eos": True},
                )
                logprobs = answer.choices[0].logprobs
                assert logprobs is not None
                asked.http.append(tuple(map(int, logprobs.tokens or ())))  # without a tokenizer, their numbers

    hook = threading.excepthook
    threading.excepthook = lambda args: asked.failures.append(args.exc_value or args.exc_type())
    askers = [threading.Thread(target=each) for each in (ask, ask, ask_over_http)]
    try:
        for asker in askers:
            asker.start()
        until(lambda: bool(asked.failures or (len(asked.grpc) > 1 and asked.http)), 60)
        yield asked
    finally:
        is_over.set()
        for asker in askers:
            asker.join(120)
        threading.excepthook = hook
    assert asked.failures == []
    assert {len(answer) for answer in [*asked.grpc, *asked.http]} == {40}


def test_options_change_under_requests_and_each_answer_is_whole(cluster: RunningCluster, folder: Path) -> None:
    before = pids(cluster)
    with asking(cluster) as asked:
        said = cluster.colm("up", "--config", str(toml(folder, "second", batch=3, requests=63))).stderr
    assert "decode.max_batch_size: 4 -> 3" in said
    assert "gateway.max_requests: 64 -> 63" in said
    assert len(set(asked.grpc)) == 1
    until(lambda: not before[Role.DECODE] & pids(cluster)[Role.DECODE], 60)  # it may still finish what it has
    after = pids(cluster)
    assert before[Role.PREFILL] == after[Role.PREFILL]
    assert "already" in cluster.colm("up", "--config", str(folder / "second.toml")).stderr
    assert pids(cluster) == after


def test_a_change_that_fails_is_taken_back(cluster: RunningCluster, folder: Path) -> None:
    before = pids(cluster)
    slow = toml(folder, "slow", batch=2, requests=63, rest="[ray]\nready_timeout_s = 0.001\n")
    done = cluster.colm("up", "--config", str(slow), check=False)
    assert (done.returncode, "ray.ready_timeout_s=0.001" in done.stderr) == (1, True)
    assert "taking the change back" in done.stderr
    assert pids(cluster)[Role.PREFILL] == before[Role.PREFILL]
    with cluster.client() as client:
        assert len(collect(client.generate(token_ids=PROMPT, max_new_tokens=4, sampling=GREEDY)).tokens) == 4
    options = ClusterState.require(cluster.state_dir).options
    assert options["decode"]["max_batch_size"] != 2


def test_what_clients_rely_on_does_not_change(cluster: RunningCluster, folder: Path) -> None:
    moved = toml(folder, "moved", batch=3, requests=63, rest='[security]\ntoken = "off"\n')
    done = cluster.colm("up", "--config", str(moved), check=False)
    assert done.returncode == 1
    assert "security.token='off': a cluster is up with 'auto'" in done.stderr
    assert "run `colm down` first" in done.stderr


def test_a_load_brings_a_replica_and_its_end_takes_it_away_and_no_request_fails(
    cluster: RunningCluster, folder: Path
) -> None:
    by_load = (
        "[prefill]\nmax_replicas = 2\ntarget_queue_s = 1e-6\nscale_up_s = 1\nscale_down_s = 2\nprefix_cache_bytes = 0\n"
    )
    cluster.colm("up", "--config", str(toml(folder, "by_load", batch=3, rest=by_load)))
    prompts, failures, is_over = count(3), [], threading.Event()

    def ask() -> None:
        """Ask for prompts that begin differently, so that each is computed."""
        with cluster.client() as client:
            while not is_over.is_set():
                token_ids = [3 + next(prompts) % 300, *PROMPT, *PROMPT]
                answer = collect(client.generate(token_ids=token_ids, max_new_tokens=2, sampling=GREEDY))
                assert len(answer.tokens) == 2

    def asking(num_clients: int) -> list[threading.Thread]:
        is_over.clear()
        askers = [threading.Thread(target=ask) for _ in range(num_clients)]
        for asker in askers:
            asker.start()
        return askers

    def end(askers: list[threading.Thread]) -> None:
        is_over.set()
        for asker in askers:
            asker.join(120)

    def pool() -> PoolStatus | None:
        with cluster.client() as client:
            return next(iter(client.cluster_status().pools), None)

    def has(num_wanted: int, num_present: int) -> bool:
        return (seen := pool()) is not None and (seen.num_wanted, seen.num_present) == (num_wanted, num_present)

    threading.excepthook, hook = lambda args: failures.append(args.exc_value or args.exc_type()), threading.excepthook
    try:
        askers = asking(6)
        until(lambda: has(2, 2), 120, lambda: f"{pool()}")
        end(askers)
        until(lambda: has(1, 2) or has(1, 1), 60, lambda: f"{pool()}")
        askers = asking(1)  # alone, a prompt asks for no second replica, and finds the one that stays
        until(lambda: has(1, 1), 120, lambda: f"{pool()}")
    finally:
        end(askers)
        threading.excepthook = hook
    assert failures == []
    assert "prefill: 1 of 1 replicas wanted, 1 to 2 allowed" in cluster.colm("status").stdout


def test_another_checkpoint_takes_over_under_requests_and_no_answer_is_of_both(
    cluster: RunningCluster, folder: Path
) -> None:
    before = pids(cluster)
    with asking(cluster) as asked:
        third = toml(folder, "third", batch=3, requests=63, model="next")
        tuned = f'[model.variants.tuned]\npath = "{folder / "tuned"}"\nmax_replicas = 2\nmax_batch_size = 2\n'
        third.write_text(third.read_text() + tuned)
        said = cluster.colm("up", "--config", str(third)).stderr
        num_answers = len(asked.grpc), len(asked.http)
        until(lambda: len(asked.grpc) > num_answers[0] + 2 and len(asked.http) > num_answers[1] + 1, 60)
    assert "new requests go to tiny" in said
    for answers in (asked.grpc, asked.http):
        assert {*answers} == {answers[0], answers[-1]}
        assert answers[0] != answers[-1]
    assert {*asked.grpc} == {*asked.http}
    until(lambda: len(cluster.nodes(Role.DECODE)) == 2, 60)
    after = pids(cluster)
    assert not [role for role in Role if before[role] & after[role]]
    with cluster.client() as client:
        events = client.generate(token_ids=PROMPT, max_new_tokens=40, sampling=GREEDY, model="tuned")
        assert tuple(token.token_id for token in collect(events).tokens) not in {*asked.grpc}
        assert [(pool.name, pool.max_replicas) for pool in client.cluster_status().pools] == [("decode-tuned", 2)]
    assert ClusterState.require(cluster.state_dir).options["model"]["path"] == str(folder / "next")


def test_a_variant_goes_and_the_others_requests_and_replicas_go_on(cluster: RunningCluster, folder: Path) -> None:
    before = pids(cluster)
    with asking(cluster):
        alone = toml(folder, "alone", batch=3, requests=63, model="next")
        said = cluster.colm("up", "--config", str(alone)).stderr
        until(lambda: len(cluster.nodes(Role.DECODE)) == 1, 60)
    assert f"model.variants.tuned.path: {folder / 'tuned'} -> None" in said
    after = pids(cluster)
    assert after[Role.PREFILL] == before[Role.PREFILL]
    assert after[Role.DECODE] < before[Role.DECODE]
    with cluster.client() as client, pytest.raises(UnknownModel, match="this cluster serves 'tiny'"):
        collect(client.generate(token_ids=PROMPT, max_new_tokens=4, model="tuned"))
