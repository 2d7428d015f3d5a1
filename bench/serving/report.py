"""The windows as rows: a table for the terminal, one object for programs, docs/serving.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.harness import markdown
from bench.harness.units import digits, duration
from bench.serving.outcome import Percentiles, Summary
from bench.serving.record import WindowRecord, pooled
from bench.serving.systems import NAMES, Name
from bench.serving.trace import PATTERNS, Pattern
from cluster.cli.output import human_bytes

BEGIN, END = "<!-- bench.serving: figures -->", "<!-- bench.serving: end -->"
COLUMNS = (
    *("arrivals", "system", "answered", "first token", "per token", "longest gap", "to the end", "in queue"),
    *("goodput", "CPU", "memory"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A system under one load, over all rounds."""

    pattern: Pattern
    arrivals: str
    """The pattern in words, with how its moments are distributed."""
    rate_per_s: float
    system: Name
    summary: Summary
    cpu_s: float
    """Of all roles, over all windows."""
    peak_bytes: int
    """The highest of the windows."""
    roles: dict[str, dict[str, float]]
    """By role: `cpu_s` and `peak_bytes`, likewise."""

    def words(self) -> tuple[str, ...]:
        """As in `COLUMNS`."""
        found = self.summary
        others = ", ".join(f"{count} {name}" for name, count in found.outcomes.items() if count and name != "finished")
        answered = f"{found.outcomes['finished']} of {found.num_requests}"
        times = (found.ttft_s, found.tpot_s, found.longest_gap_s, found.total_s, found.queue_s)
        return (
            f"{self.arrivals} {self.rate_per_s:g}/s",
            self.system,
            f"{answered}; {others}" if others else answered,
            *map(_pair, times),
            f"{digits(found.goodput_per_s)}/s",
            duration(self.cpu_s),
            human_bytes(self.peak_bytes),
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "arrivals": self.arrivals,
            "rate_per_s": self.rate_per_s,
            "system": self.system,
            **self.summary.model_dump(mode="json"),
            "cpu_s": self.cpu_s,
            "peak_bytes": self.peak_bytes,
            "roles": self.roles,
        }


def _pair(found: Percentiles) -> str:
    """Median and 95th percentile, e.g. `41.2 / 102 ms`; `never` where so many had none, `none` where none counts."""
    if not found.num:
        return "none"
    if found.p50 is None:
        return "never"
    if found.p95 is None:
        return f"{duration(found.p50)} / never"
    unit, size = ("s", 1.0) if found.p95 >= 1 else ("ms", 1e-3)
    return f"{digits(found.p50 / size)} / {digits(found.p95 / size)} {unit}"


def rows(windows: Sequence[WindowRecord]) -> list[Row]:
    """By pattern, rate and system."""
    groups: dict[tuple[int, float, int], list[WindowRecord]] = {}
    for each in windows:
        key = (PATTERNS.index(each.load.pattern), each.load.rate_per_s, NAMES.index(each.system))
        groups.setdefault(key, []).append(each)
    return [_row(groups[key]) for key in sorted(groups)]


def _row(group: Sequence[WindowRecord]) -> Row:
    first = group[0]
    roles = {
        role: {
            "cpu_s": round(sum(each.usage[role].cpu_s for each in group if role in each.usage), 2),
            "peak_bytes": max(each.usage[role].peak_bytes for each in group if role in each.usage),
        }
        for role in dict.fromkeys(role for each in group for role in each.usage)
    }
    return Row(
        pattern=first.load.pattern,
        arrivals=first.load.arrivals,
        rate_per_s=first.load.rate_per_s,
        system=first.system,
        summary=pooled(group),
        cpu_s=sum(each.server_cpu_s for each in group),
        peak_bytes=max(each.server_peak_bytes for each in group),
        roles=roles,
    )


def print_table(out: Console, found: Sequence[Row]) -> None:
    """The rows, for people."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(*row.words())
    out.print(table)
    out.print("times: median / what 95 in 100 do not exceed; all count from the arrival")


def check_page(page: Path) -> None:
    """See that a page has a place for the figures.

    Raises:
        ConfigError: the page cannot be read or has not the two markers.
    """
    markdown.around(page, BEGIN, END)


def write_docs(page: Path, found: Sequence[Row], windows: Sequence[WindowRecord], record: str, plot: str) -> None:
    """Put plot, table and their source between a page's two markers.

    Args:
        page: docs/serving.md.
        found: the rows.
        windows: behind them.
        record: the record's path, as the page links it.
        plot: likewise.

    Raises:
        ConfigError: the page cannot be read or has not the two markers.
    """
    lines = [
        f"![Times to first token and per token, and goodput, against the rate of arrivals]({plot})",
        "",
        *markdown.table(COLUMNS, [row.words() for row in found]).splitlines(),
        "",
        *(f"- {each}" for each in conditions(windows)),
        f"- Record: [{Path(record).name}]({record}), run {windows[0].run}, `{windows[0].environment.get('command')}`.",
    ]
    markdown.replace_between(page, BEGIN, END, lines)


def conditions(windows: Sequence[WindowRecord]) -> list[str]:
    """What was asked, of what, on which machine; the same for all windows of a run but pattern and rate."""
    first, environment = windows[0], windows[0].environment
    load, dirty = first.load, ", with changes" if environment.get("dirty") else ""
    num_rounds = len({each.round for each in windows})
    return [
        f"{environment.get('date')}, {environment.get('cpu')}, {environment.get('threads')} threads, {first.model}, "
        f"{first.dtype}, commit {str(environment.get('commit'))[:7]}{dirty}.",
        f"Windows of {load.seconds:g} s, {num_rounds} for each row, seed {first.seed}, timeout {first.timeout_s:g} s, "
        f"bursts of {load.burst_size}.",
        f"Prompt tokens {load.documents}; new tokens {load.answers}; {load.shared_fraction:.0%} of the prompts begin "
        f"with one of {load.num_prefixes} prefixes of {load.prefix_tokens} tokens.",
        f"Objective: {first.objective}. Times are median / 95th percentile.",
    ]
