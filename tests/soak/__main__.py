"""`make soak`: mixed requests on a local cluster, with faults of requests, and replicas killed or told to end.

Meanwhile `colm up` changes an option of both roles, which replaces all their replicas; from then on the number of
decode replicas follows the load, which wants two. Then it changes the model under the requests, and back.

With `--documents N`: N questions about four times more documents than the caches of nodes in this process hold.

Every request must end in one right answer, wholly of one model, or one typed error; with `--strict` in an answer,
where it has no fault of its own. Memory must stay flat, and nothing be held at the end.
"""

import argparse
import asyncio
import json
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.environment import environment
from cluster.cli.output import note
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import Client, collect
from colm.errors import ColmError
from colm.events import Accepted
from tests.e2e.conftest import holds
from tests.soak import documents
from tests.soak.changes import Cluster, changes, other_model
from tests.soak.counts import Counts, record_of, table_of
from tests.soak.faults import Fault, ask_for_nothing, cancel, lines, read_slowly, run_out_of_time
from tests.soak.questions import End, Question, questions
from tests.soak.watch import ROLES, Watch
from tests.tiny import tiny_checkpoint, tiny_config

_IDLE_S = 120.0
_SAY_EVERY_S = 5.0
_FIRST, _OTHER = "first", "other"


def main() -> int:
    """Soak, print a table, write a record; exit with 1 if something must not have been."""
    options = _options()
    if options.documents:
        return _soak_documents(options)
    with tempfile.TemporaryDirectory(prefix="colm-soak-") as name:
        folder = Path(name)
        if options.model is None:
            config = tiny_config(num_layers=4, max_context=8192)
            first = tiny_checkpoint(folder / _FIRST, config, tokenizer=True)
        else:
            first = Checkpoint.open(options.model)
        models = {_FIRST: first.path, _OTHER: other_model(folder / _OTHER, first).path}
        # So little that the tiny model's requests wait for pages now and then; prompts of a real one take seconds.
        limits = ("32MiB", 30.0) if options.model is None else ("4GiB", 120.0)
        cluster = Cluster(folder=folder, kv_cache_bytes=limits[0], drain_s=limits[1])
        try:
            record = soak(cluster, models, options)
        finally:
            cluster.down()
    return _end(
        record | {"model": str(options.model or "tiny, random weights")}, table_of(record), options, "soak.json"
    )


def _soak_documents(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="colm-soak-") as folder:
        checkpoint = tiny_checkpoint(Path(folder) / "tiny")
        plan = documents.Plan(num_asked=options.documents, seed=options.seed, num_workers=options.workers)
        record = asyncio.run(documents.soak(checkpoint, plan))
    table = Table("", "", title=f"{options.documents} questions about {documents.NUM_DOCUMENTS} documents")
    for name, value in record.items():
        if name != "problems":
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    return _end(record, table, options, "soak_documents.json")


def _end(record: dict[str, Any], table: Table, options: argparse.Namespace, file_name: str) -> int:
    """Show and write a record; 1 if something must not have been."""
    record |= {"command": shlex.join(["python", "-m", "tests.soak", *sys.argv[1:]]), **environment()}
    Console().print(table)
    output: Path = options.output or Path("bench/results") / file_name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(record))  # noqa: T201
    for problem in record["problems"]:
        note(f"FAILED: {problem}")
    return int(bool(record["problems"]))


def soak(cluster: Cluster, models: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Ask each model while nothing goes wrong, then the same while much does, and while options and model change."""
    known: list[Question] = []
    revisions: dict[str, str] = {}
    for model, path in reversed(models.items()):  # the first one is the one that runs then
        note(f"colm up --model {path}")
        cluster.up(path)
        state = ClusterState.require(cluster.state_dir)
        with Client(state.gateway_address, state.security) as client:
            asked = known or questions(
                random.Random(options.seed), options.questions, client.cluster_status().models[0]
            )
            note(f"the {model} model's answers of {len(asked)} requests while nothing goes wrong")
            answered = [_answered(question, client) for question in asked]
        known = [question for question, _ in answered]
        ((revisions[model]),) = {revision for _, revision in answered}
    num_alike = sum(len({*map(tuple, question.expected.values())}) < len(models) for question in known)
    assert num_alike <= len(known) // 10, f"{num_alike} answers of both models are the same"
    counts = Counts({revision: model for model, revision in revisions.items()})
    note(f"{options.seconds:g} s of them, {options.faults:.0%} with faults, a kill every {options.kill_every:g} s")
    is_over = threading.Event()
    with (
        lines(state) as broken,
        Watch(state, kill_every_s=options.kill_every, seed=options.seed, say=note) as watch,
        ThreadPoolExecutor(options.workers + 1) as threads,
    ):
        faults: list[Fault] = [cancel, run_out_of_time, read_slowly, ask_for_nothing, broken.break_off]
        done = [
            threads.submit(
                _work, state, random.Random(f"{options.seed} {number}"), known, faults, options.faults, counts, is_over
            )
            for number in range(options.workers)
        ]
        changing = threads.submit(changes, cluster, *models.values(), watch, counts.started_s, options.seconds, note)
        try:
            while not changing.done() or time.monotonic() < counts.started_s + options.seconds:
                time.sleep(_SAY_EVERY_S)
                note(f"{time.monotonic() - counts.started_s:4.0f} s: {counts.line()}")
        finally:
            is_over.set()
        for each in done:
            each.result()
    run_s = time.monotonic() - counts.started_s
    return record_of(options, counts, watch, run_s, _held(state), changing.result()) | {"num_alike": num_alike}


def _answered(question: Question, client: Client) -> tuple[Question, str]:
    """The question with the answer of the model that runs, and the revision of that."""
    events = list(question.ask(client))
    answer = collect(events)
    usage = answer.finished.usage
    num_accounted = usage.num_cached_tokens + usage.num_prefill_tokens + usage.num_decode_prompt_tokens
    assert num_accounted == question.num_prompt_tokens
    (revision,) = {event.revision for event in events if isinstance(event, Accepted)}
    expected = question.expected | {revision: [token.token_id for token in answer.tokens]}
    return replace(question, expected=expected), revision


def _work(
    state: ClusterState,
    draw: random.Random,
    known: Sequence[Question],
    faults: Sequence[Fault],
    fault_share: float,
    counts: Counts,
    is_over: threading.Event,
) -> None:
    """Ask one after the other, as a client does."""
    with Client(state.gateway_address, state.security) as client:
        while not is_over.is_set():
            question, name = draw.choice(known), ""
            if draw.random() < fault_share:
                fault = draw.choice(faults)
                name = fault.__name__
                outcome = fault(draw, question, client)
            else:
                outcome = question.judge(question.ask(client))
            counts.note(question, name, outcome)
            if outcome.end is End.UNAVAILABLE:
                _until_there(client, is_over)


def _until_there(client: Client, is_over: threading.Event) -> None:
    """Wait for the gateway and its nodes, as a client does that was told to try again."""
    while not is_over.is_set():
        try:
            if {node.report.role for node in client.cluster_status().nodes}:
                return
        except ColmError:
            pass
        is_over.wait(0.25)


def _held(state: ClusterState) -> list[str]:
    """What is held, once it has had time to be let go of."""
    give_up_s = time.monotonic() + _IDLE_S
    while True:
        try:
            with Client(state.gateway_address, state.security) as client:
                status = client.cluster_status()
            held = [f"gateway: {status.num_active_requests} requests"] * bool(status.num_active_requests)
            held += [str(node.report) for node in status.nodes if holds(node.report)]
            there = {node.report.role.value for node in status.nodes}
            held += [f"no {role} is there" for role in ROLES[1:] if role not in there]
        except ColmError as error:
            held = [str(error)]
        if not held or time.monotonic() > give_up_s:
            return held
        time.sleep(0.25)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of requests, faults and kills (default 0)")
    parser.add_argument("--workers", type=int, default=4, help="requests at once (default 4)")
    parser.add_argument("--questions", type=int, default=60, help="different requests (default 60)")
    parser.add_argument("--faults", type=float, default=0.05, help="share of requests with a fault (default 0.05)")
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds between kills; 0 for none (default 20)")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default a tiny one with random weights")
    parser.add_argument("--strict", action="store_true", help="fail if a killed process costs a request its answer")
    parser.add_argument("--documents", type=int, metavar="N", help="ask N questions about documents instead")
    parser.add_argument("--output", type=Path, help="where the record goes (default in bench/results)")
    parser.add_argument("--json", action="store_true", help="print the record as the last line")
    options = parser.parse_args()
    if not 0 <= options.faults <= 1:
        parser.error(f"--faults={options.faults}: must be a share from 0 to 1")
    for name in ("seconds", "workers", "questions"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}={getattr(options, name)}: must be above 0")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as late:
        sys.exit(f"{late}")
