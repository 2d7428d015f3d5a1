"""The benchmark of serving: arrivals, what becomes of requests, the reference server, the command."""

import asyncio
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.serving import __main__ as command
from bench.serving.arrivals import MIN_BURSTINESS
from bench.serving.check import check_greedy
from bench.serving.one_process import OneProcess, serving
from bench.serving.open_loop import answer, run_trace, send_all
from bench.serving.outcome import Summary
from bench.serving.record import last_run
from bench.serving.systems import System, by_role, serve_one_process
from bench.serving.trace import Asked, Load, LogNormal, arrivals, check_lengths, text_for, trace
from bench.serving.usage import RoleUsage, Usage
from bench.simulate.workload import Always, Workload
from cluster.front_door.placement import DecodeJob, DecodeLease
from cluster.options import load_config
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import Client, collect
from colm.clock import Deadline, MonotonicClock
from colm.convert.scale import slice_scale
from colm.dtypes import fastest_dtype
from colm.errors import (
    CapacityExceeded,
    ColmError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    PeerUnavailable,
    Unauthenticated,
)
from colm.events import Event, Finished, FinishReason, Timings, Token
from colm.events import Usage as Used
from colm.kv import KvFormat, fingerprint
from colm.nodes import NodeReport, ProcessFacts, Role
from colm.placement import CPU
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from colm.wire.security import Security
from tests import children
from tests.serving_windows import LENGTHS, LOAD, OBJECTIVE
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(count: int, rng: np.random.Generator) -> Any:
    return rng.integers(0, 300, count)


# Arrivals.


def test_gaps_between_poisson_arrivals_are_exponential() -> None:
    load = LOAD.model_copy(update={"rate_per_s": 20.0, "seconds": 200.0})
    times = arrivals(load, np.random.default_rng(1))
    assert len(times) == 4000
    gaps = np.sort(np.diff(times))
    seen = np.arange(1, len(gaps) + 1) / len(gaps)
    # Kolmogorov's distance; 1.63 / sqrt(n) is passed by 1 in 100 samples of the right distribution.
    assert np.abs(seen - (1 - np.exp(-20 * gaps))).max() < 1.63 / math.sqrt(len(gaps))


@pytest.mark.parametrize("burstiness", [0.2, 0.5, 1.0, 4.0])
def test_both_generators_have_the_mean_and_the_variance_of_gamma_arrivals(burstiness: float) -> None:
    """Of the shape k the mean is 1 and the variance 1/k, of a sample of N with deviations of sqrt(1 / (k N)) and
    sqrt((2 + 6/k) / N) of itself: 5 of them are passed by 1 in a million samples."""
    count = 20_000
    load = LOAD.model_copy(update={"rate_per_s": 20.0, "seconds": count / 20.0, "burstiness": burstiness})
    of_window = np.diff(arrivals(load, np.random.default_rng(1)))
    workload = Workload(
        rate_per_s=20.0, num_requests=count, prompts=Always(1), answers=Always(1), num_chains=1, max_context=8,
        burstiness=burstiness,
    )  # fmt: skip
    simulated = np.diff([request.at_s for request in workload.requests(seed=1)])
    for gaps_s in (of_window, simulated):
        gaps = 20.0 * gaps_s
        assert gaps.mean() == pytest.approx(1, abs=5 * math.sqrt(1 / (burstiness * count)))
        assert gaps.var() * burstiness == pytest.approx(1, abs=5 * math.sqrt((2 + 6 / burstiness) / count))


@given(
    st.sampled_from(["poisson", "bursts"]),
    st.floats(0.01, 50),
    st.floats(0.1, 100),
    st.integers(1, 7),
    st.sampled_from([MIN_BURSTINESS, 1.0, 30.0]),
    st.integers(0, 3),
)
def test_as_many_requests_arrive_as_the_rate_says_and_none_outside_the_window(
    pattern: str, rate_per_s: float, seconds: float, burst_size: int, burstiness: float, seed: int
) -> None:
    load = Load.model_validate(
        LOAD.model_dump()
        | {"pattern": pattern, "rate_per_s": rate_per_s, "seconds": seconds, "burst_size": burst_size}
        | {"burstiness": burstiness}
    )
    times = arrivals(load, np.random.default_rng(seed))
    together = burst_size if pattern == "bursts" else 1
    assert len(times) == load.num_requests
    assert abs(len(times) - rate_per_s * seconds) <= together
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= seconds
    assert all(len(set(times[first : first + together])) == 1 for first in range(0, len(times), together))


def test_lengths_have_the_median_and_the_spread_that_they_are_given() -> None:
    drawn = LogNormal(median=256, sigma=0.9, low=1, high=1 << 20).draw(20_000, np.random.default_rng(0))
    logs = np.log(drawn)
    assert np.median(drawn) == pytest.approx(256, rel=0.03)
    assert logs.std() == pytest.approx(0.9, rel=0.03)
    clipped = LogNormal(median=256, sigma=0.9, low=100, high=500).draw(1000, np.random.default_rng(0))
    assert (clipped.min(), clipped.max()) == (100, 500)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("256,0.9,32", "is not MEDIAN,SIGMA,LOW,HIGH"),
        ("0,0.9,32,64", "median"),
        ("9,-1,32,64", "sigma"),
        ("9,1,0,64", "low"),
        ("9,1,64,32", "low=64 is above high=32"),
        ("a,1,32,64", "median"),
    ],
)
def test_a_distribution_that_is_none_is_refused(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--documents", text])
    assert words in capsys.readouterr().err


def test_a_trace_depends_on_the_seed_alone_and_has_its_share_of_shared_prefixes() -> None:
    first, again, other = (trace(LOAD, noise, seed) for seed in ([3, 0], [3, 0], [3, 1]))
    assert [each.at_s for each in first] == [each.at_s for each in again] != [each.at_s for each in other]
    assert all(np.array_equal(one.token_ids_N, two.token_ids_N) for one, two in zip(first, again, strict=True))
    shared = [each for each in first if each.prefix is not None]
    assert len(shared) == round(0.3 * LOAD.num_requests)
    for each in first:
        assert LENGTHS.low <= len(each.token_ids_N) <= LENGTHS.high
        assert 1 <= each.max_new_tokens <= 8
    begins = {(each.prefix, *each.token_ids_N[:2].tolist()) for each in shared}
    assert len(begins) == len({each.prefix for each in shared})


def test_lengths_beyond_the_context_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(max_context=64))
    with pytest.raises(ConfigError, match=r"--documents up to 60 .* make 68, beyond the model's context of 64; lower"):
        check_lengths(LOAD, checkpoint)


def test_a_model_with_a_tokenizer_reads_prose_and_one_without_reads_noise(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    ids = text_for(checkpoint)(1000, np.random.default_rng(0))
    assert 0 <= ids.min() <= ids.max() < checkpoint.config.vocab_size


# Outcomes.


def token(token_id: int = 7) -> Token:
    return Token(token_id=token_id, text="", logprob=0.0, num_chains=1)


FINISHED = Finished(
    reason=FinishReason.LENGTH,
    usage=Used(
        num_prompt_tokens=3,
        num_prefill_tokens=2,
        num_decode_prompt_tokens=1,
        num_new_tokens=3,
        kv_received_bytes=0,
        kv_effective_bytes=0,
        num_kv_streams=1,
    ),
    timings=Timings(queue_s=0.25, prefill_s=0.1, first_token_s=0.5, decode_s=0.2),
)
ASKED = Asked(at_s=1.0, token_ids_N=np.arange(3), max_new_tokens=3, prefix=None)


def scripted(*steps: Event | ColmError) -> Callable[[Asked], AsyncGenerator[Event]]:
    async def generate(_: Asked, /) -> AsyncGenerator[Event]:
        for step in steps:
            if isinstance(step, ColmError):
                raise step
            yield step

    return generate


async def test_times_count_from_when_a_request_was_to_arrive_not_from_when_it_was_sent() -> None:
    """A client that the system has held up would else leave out the wait that it was held up for."""
    clock = iter([103.0, 104.0, 104.5, 106.0, 107.0]).__next__
    found = await answer(scripted(token(), token(), token(), FINISHED), ASKED, 100.0, clock)
    assert (found.outcome, found.error, found.num_new_tokens) == ("finished", "", 3)
    assert (found.at_s, found.sent_late_s, found.ttft_s) == (1.0, 2.0, 3.0)
    assert (found.tpot_s, found.longest_gap_s, found.total_s, found.queue_s) == (1.0, 1.5, 6.0, 0.25)


@pytest.mark.parametrize(
    ("steps", "outcome", "num_new_tokens"),
    [
        ([CapacityExceeded("full")], "refused", 0),
        ([DeadlineExceeded("over")], "late", 0),
        ([token(), DeadlineExceeded("over")], "late", 1),
        ([token(), token(), PeerUnavailable("gone")], "failed", 2),
        ([InvalidRequest("token_ids", 7, "no")], "failed", 0),
        ([token()], "failed", 1),
        ([token(), FINISHED], "finished", 1),
    ],
)
async def test_every_end_is_one_outcome(steps: list[Event | ColmError], outcome: str, num_new_tokens: int) -> None:
    found = await answer(scripted(*steps), ASKED, 0.0, iter(range(2, 20)).__next__)
    assert (found.outcome, found.num_new_tokens) == (outcome, num_new_tokens)
    assert bool(found.error) == (outcome != "finished")
    assert (found.ttft_s is None) == (num_new_tokens == 0)
    assert (found.tpot_s is None) == (num_new_tokens < 2)


async def test_requests_are_sent_when_they_are_due_although_none_is_answered() -> None:
    waiting, all_here = 0, asyncio.Event()

    async def generate(_: Asked, /) -> AsyncGenerator[Event]:
        nonlocal waiting
        waiting += 1
        if waiting == 3:
            all_here.set()
        await all_here.wait()
        yield token()
        yield FINISHED

    ended: list[int] = []
    asked = [replace(ASKED, at_s=at_s) for at_s in (0.0, 0.0, 0.05)]
    async with asyncio.timeout(60):
        found = await send_all(generate, asked, lambda: ended.append(1))
    assert [each.outcome for each in found] == ["finished"] * 3
    assert [each.at_s for each in found] == [0.0, 0.0, 0.05]
    assert len(ended) == 3


# The reference server.


def config_of(checkpoint: Checkpoint, **overrides: Any) -> Any:
    values = {"model.path": checkpoint.path, "model.dtype": "float32", "gateway.port": 0, "prefill.tile_tokens": 31}
    return load_config(None, values | {"decode.page_tokens": 16, "decode.kv_cache_bytes": 1 << 20} | overrides)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("serving") / "tiny", tokenizer=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Without a tokenizer, so that no text has to be encoded."""
    return tiny_checkpoint(tmp_path_factory.mktemp("serving") / "bare")


def assert_idle(engine: OneProcess) -> None:
    engine.pool.check_integrity()
    assert engine.pool.num_used == 0


async def test_one_process_answers_as_the_model_does_whatever_else_it_answers(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 270, length) for length in (1, 2, 31, 32, 33, 100)]
    greedy = SamplingParams(ignore_eos=True)

    def ask(address: str, number: int) -> list[int]:
        with Client(address) as client:
            found = collect(client.generate(token_ids=prompts[number], max_new_tokens=6, sampling=greedy))
        assert found.finished.usage.num_prompt_tokens == len(prompts[number])
        assert found.finished.timings.queue_s >= 0
        return [each.token_id for each in found.tokens]

    async with serving(checkpoint.path, config_of(checkpoint), Security()) as (address, engine):
        answers = await asyncio.gather(*(asyncio.to_thread(ask, address, number) for number in range(len(prompts))))
        assert_idle(engine)
    for prompt_T, answer_T in zip(prompts, answers, strict=True):
        check_greedy(checkpoint, torch.float32, prompt_T, answer_T)
    wrong_T = [(token_id + 1) % 270 for token_id in answers[-1]]
    with pytest.raises(AssertionError, match="was chosen, but"):
        check_greedy(checkpoint, torch.float32, prompts[-1], wrong_T)


def job(num_prompt_tokens: int, max_new_tokens: int) -> DecodeJob:
    return DecodeJob(
        request_id=str(num_prompt_tokens),
        token_ids=np.arange(3, 3 + num_prompt_tokens),
        scale=Changing(Scale(num_chains=1, min_chains=1)),
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(ignore_eos=True),
        attention="dense",
        kv_codec="raw",
        max_draft_tokens=None,
    )


async def all_at_once(engine: OneProcess, jobs: Sequence[DecodeJob]) -> tuple[list[str], list[Any]]:
    """Have jobs wait before the first is begun; returns the owners of all events as made, and the jobs' own times."""
    lease, deadline = DecodeLease(address="", lease_id=""), Deadline.after(MonotonicClock(), 60)
    owners: list[str] = []

    async def ask(each: DecodeJob) -> None:
        async for _ in engine.decode(lease, each, only_if_room=False, deadline=deadline):
            pass

    def noting(work: Any, emit: Callable[[Any], None]) -> Callable[[Any], None]:
        def note(event: Any) -> None:
            owners.append(work.job.request_id)
            emit(event)

        return note

    with engine._changed:
        tasks = [asyncio.create_task(ask(each)) for each in jobs]
        while len(engine._waiting) < len(jobs):
            await asyncio.sleep(0)
        works = list(engine._waiting)
        for work in works:
            work.emit = noting(work, work.emit)
    await asyncio.gather(*tasks)
    return owners, works


@pytest.fixture
def one_process(checkpoint: Checkpoint) -> Iterator[Callable[..., OneProcess]]:
    made: list[OneProcess] = []

    def make(**options: Any) -> OneProcess:
        kv_format = KvFormat.of(checkpoint.config, torch.float32)
        made.append(OneProcess(checkpoint, kv_format, config_of(checkpoint, **options)))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
        assert_idle(engine)


async def test_one_process_takes_prompts_in_the_order_in_which_they_came(
    one_process: Callable[..., OneProcess],
) -> None:
    """One answer at a time: the shortest, which came last, is last."""
    owners, _ = await all_at_once(
        one_process(**{"decode.max_batch_size": 1}), [job(99, 3), job(60, 2), job(30, 2), job(2, 1)]
    )
    # The last event of each is the end.
    assert owners == 4 * ["99"] + 3 * ["60"] + 3 * ["30"] + 2 * ["2"]


async def test_every_prompt_that_waits_goes_before_the_answers_and_has_its_first_token_before_the_next(
    one_process: Callable[..., OneProcess],
) -> None:
    owners, works = await all_at_once(one_process(), [job(40, 3), job(30, 3), job(2, 3)])
    # The last event of each is the end.
    assert owners == ["40", "30", "2"] * 2 + ["40", "40", "30", "30", "2", "2"]
    for earlier, later in pairwise(works):
        assert earlier.started_s < earlier.first_token_s <= later.started_s


async def test_a_whole_trace_through_the_gateway_ends_with_one_outcome_each_and_nothing_held(
    checkpoint: Checkpoint,
) -> None:
    load = LOAD.model_copy(update={"rate_per_s": 100.0, "seconds": 0.3})
    asked = trace(load, noise_of(checkpoint), [0])
    config = config_of(checkpoint, **{"decode.max_requests": 4})
    async with serving(checkpoint.path, config, Security()) as (address, engine):
        found = await run_trace(address, Security(), asked, timeout_s=60, ended=lambda: None)
        assert_idle(engine)
    summary = Summary.of(found, OBJECTIVE, load.seconds)
    assert sum(summary.outcomes.values()) == len(asked) == load.num_requests
    assert summary.outcomes["finished"] >= 4
    assert summary.outcomes["finished"] + summary.outcomes["refused"] == len(asked)
    for each, wanted in zip(found, asked, strict=True):
        assert each.num_new_tokens == (wanted.max_new_tokens if each.outcome == "finished" else 0)


def noise_of(checkpoint: Checkpoint) -> Callable[[int, np.random.Generator], Any]:
    return lambda count, rng: rng.integers(0, min(270, checkpoint.config.vocab_size), count)


async def test_who_leaves_frees_pages_for_who_waits_in_order_of_arrival(checkpoint: Checkpoint) -> None:
    """The cache holds one long answer: the second starts when the first is cancelled, the third after it."""
    layout_bytes = 64 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, kv heads, head dim, float32
    config = config_of(checkpoint, **{"decode.kv_cache_bytes": layout_bytes})
    async with serving(checkpoint.path, config, Security()) as (address, engine):
        assert engine.pool.num_pages == 4
        with Client(address) as client:
            greedy = SamplingParams(ignore_eos=True)
            first = client.generate(token_ids=range(3, 10), max_new_tokens=50, sampling=greedy)
            await asyncio.to_thread(next, first)
            later = [asyncio.to_thread(ask_for, address, 50) for _ in range(2)]
            tasks = [asyncio.create_task(each) for each in later]
            first.close()
            ends = await asyncio.gather(*tasks)
            assert ends == [50, 50]
            with pytest.raises(InvalidRequest, match="needs 5 KV pages with its prompt, and there are 4"):
                await asyncio.to_thread(ask_for, address, 60)
        assert_idle(engine)


def ask_for(address: str, num_tokens: int) -> int:
    with Client(address) as client:
        greedy = SamplingParams(ignore_eos=True)
        return len(collect(client.generate(token_ids=range(3, 10), max_new_tokens=num_tokens, sampling=greedy)).tokens)


async def test_the_process_of_a_system_ends_when_the_other_end_of_its_pipe_is_gone(checkpoint: Checkpoint) -> None:
    """The kernel closes that end however the benchmark ends, so nothing is left of a run that was killed."""
    mine, theirs = multiprocessing.Pipe()
    serves = asyncio.create_task(asyncio.to_thread(serve_one_process, checkpoint.path, theirs))
    found = await asyncio.to_thread(mine.recv)
    assert isinstance(found, System)
    assert found.model().fingerprint == fingerprint(checkpoint, KvFormat.of(checkpoint.config, fastest_dtype(CPU)))
    assert (tls := found.security.current_tls) is not None
    assert tls.key_pem is None
    assert found.processes() == {"one process": [psutil.Process()]}
    with pytest.raises(Unauthenticated), Client(found.address, replace(found.security, token=None)) as client:
        client.cluster_status()
    mine.close()
    async with asyncio.timeout(60):
        await serves


# What processes use.


def test_processor_time_and_memory_are_of_the_processes_of_each_role() -> None:
    busy = "import sys; kept = bytearray(b'1') * (64 << 20); sum(range(20_000_000)); print('x', flush=True); input()"
    with subprocess.Popen(
        children.python("input();" + busy), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        process = psutil.Process(child.pid)
        with Usage({"child": [process], "none": []}) as usage:
            child.stdin.write("go\n")
            child.stdin.flush()
            assert child.stdout.readline() == "x\n"
        child.stdin.write("end\n")
        child.stdin.close()
    found = usage.roles()
    assert found["none"] == RoleUsage(cpu_s=0.0, peak_bytes=0, num_processes=0)
    assert found["child"].cpu_s > 0.05
    assert found["child"].peak_bytes >= 64 << 20
    assert found["child"].num_processes == 1


def test_processes_are_known_by_what_they_report_and_the_rest_is_rays() -> None:
    me = psutil.Process()
    report = NodeReport(
        role=Role.PREFILL,
        replica_id="r",
        ray_node_id="n",
        address="",
        num_active_requests=0,
        num_queued_requests=0,
        num_leases=0,
        process=ProcessFacts.now(),
    )
    elsewhere = replace(report, process=replace(report.process, host="elsewhere", pid=1))
    assert by_role([], [report, elsewhere]) == {"prefill": [me]}
    assert by_role([me], []) == {"ray": [me]}


# The command.


async def test_every_window_is_run_recorded_and_shown(
    bare: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serving.jsonl"
    words = ["--patterns", "poisson", "bursts", "--rates", "20", "--seconds", "0.3", "--rounds", "2", "--burst", "2"]
    lengths = ["--documents", "9,1,2,60", "--answers", "3,1,1,6", "--record", str(path), "--json"]
    argv = ["serving", "--model", str(bare.path), "--systems", "one process", *words, *lengths]
    monkeypatch.setattr(sys, "argv", argv)
    config = config_of(bare, **{"model.dtype": "auto"})
    async with serving(bare.path, config, Security()) as (address, engine):

        @contextmanager
        def here(name: str, model: Path, state_dir: Path | None) -> Iterator[System]:
            assert (name, model, state_dir) == ("one process", bare.path, None)
            yield System(name="one process", address=address, security=Security(), pid=os.getpid())

        monkeypatch.setattr(command, "system", here)
        await asyncio.to_thread(command.main)
        assert_idle(engine)
    windows = last_run(path)
    assert [(each.round, each.load.pattern) for each in windows] == [
        *((0, "poisson"), (0, "bursts")),
        *((1, "poisson"), (1, "bursts")),
    ]
    assert windows[0].requests != windows[2].requests
    for each in windows:
        assert each.summary.outcomes["finished"] == each.summary.num_requests == 6
        assert set(each.usage) == {"one process", "client"}
    out, err = capsys.readouterr()
    first, second = json.loads(out.splitlines()[-1])["rows"]
    assert (first["arrivals"], first["num_requests"], second["arrivals"]) == ("poisson", 12, "bursts")
    assert "4/4 one process, bursts 20/s: 6 requests" in err


@pytest.mark.parametrize("served", ["more chains", "another dtype"])
async def test_a_cluster_that_serves_something_else_is_refused(
    bare: Checkpoint,
    served: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the fingerprint is of is the same for all models that share chain 1."""
    asked_for = slice_scale(bare.path, tmp_path / "sliced", 1) if served == "more chains" else bare
    other = {torch.bfloat16: "float32", torch.float32: "bfloat16"}[fastest_dtype(CPU)]
    config = config_of(bare, **{"model.dtype": "auto" if served == "more chains" else other})
    async with serving(bare.path, config, Security()) as (address, _):
        ClusterState(gateway_address=address, ray_address="", ray_pid=None, client_token=None, ca_file=None).write(
            tmp_path / "state"
        )
        words = ["--model", str(asked_for.path), "--documents", "9,1,9,99", "--state-dir", str(tmp_path / "state")]
        monkeypatch.setattr(sys, "argv", ["serving", *words, "--record", str(tmp_path / "serving.jsonl")])
        with pytest.raises(SystemExit):
            await asyncio.to_thread(command.main)
    assert "that cluster serves another model than --model" in capsys.readouterr().err
    assert not (tmp_path / "serving.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shared-fraction", "2"], "--shared-fraction=2.0: Input should be less than or equal to 1"),
        (["--ttft", "-1"], "--ttft=-1.0: Input should be greater than or equal to 0"),
        (["--state-dir", "nowhere"], "no cluster is known in nowhere"),
        (["--documents", "9,1,9,99999"], "--documents up to 99999 and --answers up to 64 tokens make 100063"),
        (["--model", "nowhere"], "nowhere"),
        (["--write-docs", "--docs", "nowhere"], "nowhere/serving.md cannot be read"),
    ],
)
def test_impossible_options_end_in_one_line(
    words: Sequence[str],
    message: str,
    bare: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lengths = ["--documents", "9,1,9,99"]
    monkeypatch.setattr(sys, "argv", ["serving", "--model", str(bare.path), *lengths, *words])
    with pytest.raises(SystemExit):
        command.main()
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
