"""The benchmark of serving, whole: windows, records, what is refused, processor time and memory by role."""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from bench.serving import __main__ as command
from bench.serving.one_process import serving
from bench.serving.open_loop import run_trace
from bench.serving.outcome import Summary
from bench.serving.record import last_run
from bench.serving.systems import System, by_role, serve_one_process
from bench.serving.trace import trace
from bench.serving.usage import RoleUsage, Usage
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import Client
from colm.convert.scale import slice_scale
from colm.dtypes import fastest_dtype
from colm.errors import Unauthenticated
from colm.kv import KvFormat, fingerprint
from colm.nodes import NodeReport, ProcessFacts, Role
from colm.placement import CPU
from colm.wire.security import Security
from tests import children
from tests.one_process import assert_idle, config_of
from tests.serving_windows import LOAD, OBJECTIVE
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("serving") / "tiny", tokenizer=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Without a tokenizer, so that no text has to be encoded."""
    return tiny_checkpoint(tmp_path_factory.mktemp("serving") / "bare")


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
