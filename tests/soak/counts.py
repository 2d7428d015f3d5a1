"""How the requests of a soak have ended, and the record and table of it."""

import argparse
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from cluster.cli.output import human_bytes
from tests.soak.changes import Change
from tests.soak.questions import End, Outcome, Question
from tests.soak.watch import IN_CHANGE, ROLES, WHOLE, Watch

_REQUESTS_PER_S = 500 / 600
"""What a soak must at least have asked."""
_MOST_KEPT = 50


@dataclass
class Counts:
    """How requests have ended, by several threads."""

    models: dict[str, str]
    """Names of the models, by revision."""
    ends: Counter[End] = field(default_factory=Counter)
    without_fault: Counter[End] = field(default_factory=Counter)
    """Of those that had no fault of their own: the killed processes' work."""
    faults: Counter[str] = field(default_factory=Counter)
    by_model: Counter[str] = field(default_factory=Counter)
    """Right answers."""
    bad: list[str] = field(default_factory=list)
    """What was said about the first requests that were wrong or lost."""
    unanswered: list[dict[str, Any]] = field(default_factory=list)
    """The first that got no answer and had no fault of their own."""
    started_s: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, question: Question, fault: str, outcome: Outcome) -> None:
        """Count one request."""
        end, at_s = outcome.end, round(time.monotonic() - self.started_s, 1)
        with self.lock:
            self.ends[end] += 1
            if fault:
                self.faults[fault] += 1
            else:
                self.without_fault[end] += 1
            if end is End.RIGHT:
                self.by_model[self.models[outcome.revision]] += 1
            if end in (End.WRONG, End.LOST) and len(self.bad) < _MOST_KEPT:
                self.bad.append(f"request {question.number} ({fault or 'no fault'}) {end.value}: {outcome.why}")
            if end is not End.RIGHT and not fault and len(self.unanswered) < _MOST_KEPT:
                told = {"at_s": at_s, "request": question.number, "end": end.value, "why": outcome.why[:400]}
                self.unanswered.append(told)

    @property
    def num_unanswered(self) -> int:
        """Requests without a fault of their own that got no answer."""
        return self.without_fault.total() - self.without_fault[End.RIGHT]

    def line(self) -> str:
        """All of it in a line."""
        with self.lock:
            counted = ", ".join(f"{self.ends[end]} {end.value}" for end in End)
            return f"{self.ends.total()} requests: {counted}; {self.num_unanswered} unanswered without a fault"


def record_of(
    options: argparse.Namespace, counts: Counts, watch: Watch, run_s: float, held: list[str], changes: Sequence[Change]
) -> dict[str, Any]:
    """The soak's record; `problems` says what must not have been."""
    memory = {role: watch.memory.summary(role, run_s) for role in (*ROLES, WHOLE, IN_CHANGE)}
    num_requests, num_wanted = counts.ends.total(), round(_REQUESTS_PER_S * options.seconds)
    problems = [*counts.bad]
    problems += [f"{num_requests} requests, fewer than {num_wanted}"] * (num_requests < num_wanted)
    problems += [f"held at the end: {each}" for each in held]
    problems += [
        f"memory of {role} grows: {memory[role]}" for role in (*ROLES, WHOLE) if memory[role]["is_flat"] is False
    ]
    problems += [f"a killed {kill.role} did not come back" for kill in watch.kills[:-1] if kill.back_after_s is None]
    problems += [f"{change.what}: {change.error}" for change in changes if change.error]
    problems += ["the load brought no decode replica"] * (watch.most_decode < 2)
    problems += [f"the {name} model gave no answer" for name in counts.models.values() if not counts.by_model[name]]
    if options.strict and counts.num_unanswered:
        problems.append(f"{counts.num_unanswered} requests without a fault of their own got no answer")
    return {
        "bench": "soak",
        "seed": options.seed,
        "seconds": round(run_s, 1),
        "workers": options.workers,
        "fault_share": options.faults,
        "kill_every_s": options.kill_every,
        "num_questions": options.questions,
        "num_requests": num_requests,
        "ends": {end.value: counts.ends[end] for end in End},
        "ends_without_fault": {end.value: counts.without_fault[end] for end in End},
        "right_by_model": dict(counts.by_model),
        "unanswered": counts.unanswered,
        "faults": dict(counts.faults),
        "kills": [asdict(kill) for kill in watch.kills],
        "changes": [asdict(change) for change in changes],
        "most_decode_replicas": watch.most_decode,
        "memory": memory,
        "held": held,
        "problems": problems,
    }


def table_of(record: dict[str, Any]) -> Table:
    """The record as a table."""
    table = Table(
        "", "", title=f"soak: {record['num_requests']} requests in {record['seconds']:.0f} s", show_header=False
    )
    for end, number in record["ends"].items():
        table.add_row(f"requests {end}", str(number))
    unanswered = sum(record["ends_without_fault"].values()) - record["ends_without_fault"]["right"]
    table.add_row("unanswered without a fault", str(unanswered))
    for model, number in record["right_by_model"].items():
        table.add_row(f"right answers of the {model} model", str(number))
    for role in ROLES:
        for signal in ("SIGKILL", "SIGTERM"):
            kills = [kill for kill in record["kills"] if (kill["role"], kill["signal"]) == (role, signal)]
            backs = sorted(kill["back_after_s"] for kill in kills if kill["back_after_s"] is not None)
            middle = f", back after {backs[len(backs) // 2]:.1f} s" if backs else ""
            table.add_row(f"{signal} to {role}", f"{len(kills)} times{middle}")
    for change in record["changes"]:
        table.add_row(change["what"], change["error"] or f"in {change['took_s']:.1f} s")
    table.add_row("decode replicas under the load", str(record["most_decode_replicas"]))
    for role in (*ROLES, WHOLE, IN_CHANGE):
        seen = record["memory"][role]
        slope = seen["slope_bytes_per_min"]
        grows = "not seen long enough" if slope is None else f"{human_bytes(slope)} a minute"
        table.add_row(f"{role}'s memory", f"at most {human_bytes(seen['peak_bytes'])}, {grows}")
    table.add_row("held at the end", "; ".join(record["held"]) or "nothing")
    return table
