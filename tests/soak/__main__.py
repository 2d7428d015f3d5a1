"""`make soak`: mixed requests on a local cluster, with faults of requests and killed replicas, for some minutes.

In the middle `colm up` changes an option of both roles, and replaces all their replicas. From then on the number of
decode replicas follows the load, which wants two.

With `--documents N`: N questions about four times more documents than the caches of nodes in this process hold.

Every request must end in one right answer or one typed error. Memory must stay flat, and nothing be held at the end.
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
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.environment import environment
from cluster.cli.output import human_bytes, note
from cluster.state import ClusterState
from colm import defaults
from colm.client import Client, collect
from colm.errors import ColmError
from tests.e2e.conftest import holds, run_colm
from tests.soak import documents
from tests.soak.faults import Fault, ask_for_nothing, cancel, lines, read_slowly, run_out_of_time
from tests.soak.questions import End, Question, questions
from tests.soak.watch import ROLES, WHOLE, Watch
from tests.tiny import tiny_checkpoint, tiny_config

REQUESTS_PER_S = 500 / 600
"""What a soak must at least have asked."""
_BY_LOAD = "max_replicas = 2\nscale_up_s = 5.0\ntarget_use = 0.01\n"
"""Options of a decode pool that a single request at a time makes too small."""
_IDLE_S = 120.0
_SAY_EVERY_S = 5.0


@dataclass
class Counts:
    """How requests have ended, by several threads."""

    ends: Counter[End] = field(default_factory=Counter)
    without_fault: Counter[End] = field(default_factory=Counter)
    """Of those that had no fault of their own: the killed processes' work."""
    faults: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    """What was said about the first requests that were wrong or lost."""
    unavailable: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, question: Question, fault: str, end: End, why: str) -> None:
        """Count one request."""
        with self.lock:
            self.ends[end] += 1
            if fault:
                self.faults[fault] += 1
            else:
                self.without_fault[end] += 1
            if end in (End.WRONG, End.LOST) and len(self.bad) < 20:
                self.bad.append(f"request {question.number} ({fault or 'no fault'}) {end.value}: {why}")
            if end is End.UNAVAILABLE and not fault:
                self.unavailable[why[:160]] += 1

    def line(self) -> str:
        """All of it in a line."""
        with self.lock:
            counted = ", ".join(f"{self.ends[end]} {end.value}" for end in End)
            return f"{self.ends.total()} requests: {counted}"


def main() -> int:
    """Soak, print a table, write a record; exit with 1 if something must not have been."""
    options = _options()
    if options.documents:
        return _soak_documents(options)
    with tempfile.TemporaryDirectory(prefix="colm-soak-") as folder:
        model = (
            options.model
            or tiny_checkpoint(Path(folder) / "tiny", tiny_config(num_layers=4, max_context=8192), tokenizer=True).path
        )
        file, state_dir = Path(folder) / "colm.toml", Path(folder) / "state"
        # So little that the tiny model's requests wait for pages now and then.
        kv_cache_bytes = "32MiB" if options.model is None else "4GiB"

        def bring_up(prefill: str = "", decode: str = "") -> None:
            file.write_text(
                '[model]\ndtype = "float32"\n[gateway]\nport = 0\n'
                f"[prefill]\nsparse_dense_below_tokens = 256\n{prefill}"
                f'[decode]\nkv_cache_bytes = "{kv_cache_bytes}"\n{decode}'
            )
            run_colm(state_dir, "up", "--config", str(file), "--model", str(model))

        note(f"colm up --model {model}")
        try:
            bring_up()
            # Both roles are told of max_queued.
            change = partial(bring_up, f"max_queued = {defaults.MAX_QUEUED - 1}\n", _BY_LOAD)
            record = soak(ClusterState.require(state_dir), options, change)
        finally:
            run_colm(state_dir, "down", check=False)
    return _end(record | {"model": str(options.model or "tiny, random weights")}, _table(record), options, "soak.json")


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


@dataclass(frozen=True, slots=True)
class Change:
    """A change of options under the requests."""

    at_s: float
    took_s: float
    error: str
    """What `colm up` said; empty if it changed them."""


def soak(state: ClusterState, options: argparse.Namespace, change: Callable[[], None]) -> dict[str, Any]:
    """Ask while nothing goes wrong, then ask the same while much does, and options `change` in the middle."""
    draw = random.Random(options.seed)
    with Client(state.gateway_address, state.security) as client:
        asked = questions(draw, options.questions, client.cluster_status().models[0])
        note(f"the answers of {len(asked)} requests while nothing goes wrong")
        known = [_answered(question, client) for question in asked]
    counts, started_s = Counts(), time.monotonic()
    note(f"{options.seconds:g} s of them, {options.faults:.0%} with faults, a kill every {options.kill_every:g} s")
    with (
        lines(state) as broken,
        Watch(state, kill_every_s=options.kill_every, seed=options.seed, say=note) as watch,
        ThreadPoolExecutor(options.workers + 1) as threads,
    ):
        faults: list[Fault] = [cancel, run_out_of_time, read_slowly, ask_for_nothing, broken.break_off]
        ends_s = started_s + options.seconds
        done = [
            threads.submit(
                _work, state, random.Random(f"{options.seed} {number}"), known, faults, options, counts, ends_s
            )
            for number in range(options.workers)
        ]
        changing = threads.submit(_change, change, started_s, options.seconds / 2)
        while not all(each.done() for each in done):
            time.sleep(_SAY_EVERY_S)
            note(f"{time.monotonic() - started_s:4.0f} s: {counts.line()}")
        for each in done:
            each.result()
    run_s = time.monotonic() - started_s
    return _record(options, counts, watch, run_s, _held(state), changing.result())


def _change(change: Callable[[], None], started_s: float, at_s: float) -> Change:
    time.sleep(max(0.0, started_s + at_s - time.monotonic()))
    began_s, error = time.monotonic(), ""
    note("colm up, with other options, and decode replicas by load")
    try:
        change()
    except AssertionError as err:
        error = str(err)
    return Change(round(began_s - started_s, 1), round(time.monotonic() - began_s, 1), error)


def _answered(question: Question, client: Client) -> Question:
    answer = collect(question.ask(client))
    usage = answer.finished.usage
    num_accounted = usage.num_cached_tokens + usage.num_prefill_tokens + usage.num_decode_prompt_tokens
    assert num_accounted == question.num_prompt_tokens
    return replace(question, expected=[token.token_id for token in answer.tokens])


def _work(
    state: ClusterState,
    draw: random.Random,
    known: Sequence[Question],
    faults: Sequence[Fault],
    options: argparse.Namespace,
    counts: Counts,
    ends_s: float,
) -> None:
    """Ask one after the other, as a client does."""
    with Client(state.gateway_address, state.security) as client:
        while time.monotonic() < ends_s:
            question, name = draw.choice(known), ""
            if draw.random() < options.faults:
                fault = draw.choice(faults)
                name = fault.__name__
                end, why = fault(draw, question, client)
            else:
                end, why = question.judge(question.ask(client))
            counts.note(question, name, end, why)
            if end is End.UNAVAILABLE:
                _until_there(client, ends_s)


def _until_there(client: Client, ends_s: float) -> None:
    """Wait for the gateway and its nodes, as a client does that was told to try again."""
    while time.monotonic() < ends_s:
        try:
            if {node.report.role for node in client.cluster_status().nodes}:
                return
        except ColmError:
            pass
        time.sleep(0.25)


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


def _record(
    options: argparse.Namespace, counts: Counts, watch: Watch, run_s: float, held: list[str], change: Change
) -> dict[str, Any]:
    memory = {role: watch.memory.summary(role, run_s) for role in (*ROLES, WHOLE)}
    ends = {end.value: counts.ends[end] for end in End}
    num_requests, num_wanted = counts.ends.total(), round(REQUESTS_PER_S * options.seconds)
    num_without_answer = counts.without_fault.total() - counts.without_fault[End.RIGHT]
    problems = [*counts.bad]
    problems += [f"{num_requests} requests, fewer than {num_wanted}"] * (num_requests < num_wanted)
    problems += [f"held at the end: {each}" for each in held]
    problems += [f"memory of {role} grows: {each}" for role, each in memory.items() if each["is_flat"] is False]
    problems += [f"a killed {kill.role} did not come back" for kill in watch.kills[:-1] if kill.back_after_s is None]
    problems += [f"the options did not change: {change.error}"] * bool(change.error)
    problems += ["the load brought no decode replica"] * (watch.most_decode < 2)
    if options.strict and num_without_answer:
        problems.append(f"{num_without_answer} requests without a fault of their own got no answer")
    return {
        "bench": "soak",
        "seed": options.seed,
        "seconds": round(run_s, 1),
        "workers": options.workers,
        "fault_share": options.faults,
        "kill_every_s": options.kill_every,
        "num_questions": options.questions,
        "num_requests": num_requests,
        "ends": ends,
        "ends_without_fault": {end.value: counts.without_fault[end] for end in End},
        "unavailable": dict(counts.unavailable.most_common()),
        "faults": dict(counts.faults),
        "kills": [asdict(kill) for kill in watch.kills],
        "change": asdict(change),
        "most_decode_replicas": watch.most_decode,
        "memory": memory,
        "held": held,
        "problems": problems,
    }


def _table(record: dict[str, Any]) -> Table:
    table = Table(
        "", "", title=f"soak: {record['num_requests']} requests in {record['seconds']:.0f} s", show_header=False
    )
    for end, number in record["ends"].items():
        table.add_row(f"requests {end}", str(number))
    unanswered = sum(record["ends_without_fault"].values()) - record["ends_without_fault"]["right"]
    table.add_row("unanswered without a fault", str(unanswered))
    for role in ROLES:
        backs = sorted(
            k["back_after_s"] for k in record["kills"] if k["role"] == role and k["back_after_s"] is not None
        )
        middle = f", back after {backs[len(backs) // 2]:.1f} s" if backs else ""
        table.add_row(f"{role} killed", f"{sum(k['role'] == role for k in record['kills'])} times{middle}")
    table.add_row("all replicas replaced", record["change"]["error"] or f"in {record['change']['took_s']:.1f} s")
    table.add_row("decode replicas under the load", str(record["most_decode_replicas"]))
    for role in (*ROLES, WHOLE):
        seen = record["memory"][role]
        slope = seen["slope_bytes_per_min"]
        grows = "not seen long enough" if slope is None else f"{human_bytes(slope)} a minute"
        table.add_row(f"{role}'s memory", f"at most {human_bytes(seen['peak_bytes'])}, {grows}")
    table.add_row("held at the end", "; ".join(record["held"]) or "nothing")
    return table


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
