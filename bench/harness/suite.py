"""Runs a benchmark, from its command-line arguments to its record."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from bench.harness import records
from bench.harness.contest import Case, Result, Spread, measure
from bench.harness.environment import environment, peak_memory_bytes
from bench.harness.units import parse_length, show, show_shape

WIDTH_OF_A_FILE = 140


class Options(argparse.Namespace):
    """Options of every benchmark; a benchmark with more options derives from it."""

    module: str
    rounds: int
    seed: int
    threads: int | None
    json: bool
    output: Path | None


def arguments(module: str, doc: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser of the common options, to which a benchmark may add its own."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    parser.set_defaults(module=module)
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"timed rounds of each case; {rounds}")
    parser.add_argument("--seed", type=int, default=0, help="of every random input; 0")
    parser.add_argument("--threads", type=positive, help="of PyTorch and of the kernels; PyTorch's own setting")
    parser.add_argument("--json", action="store_true", help="end with one JSON record")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record there; to .jsonl, add a line")
    return parser


def num_tokens(text: str) -> int:
    """An option's length in tokens, e.g. `2K`."""
    try:
        return parse_length(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def run(cases: Sequence[Case], options: Options, **extra: object) -> None:
    """Measure the cases and print each one's table; write the record if the options ask for it.

    Args:
        cases: they run in this order.
        options: parsed by `arguments`.
        extra: further fields of the record, beside the environment.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    environment_and_options = {
        "command": shlex.join(["python", "-m", options.module, *sys.argv[1:]]),
        **environment(),
        "seed": options.seed,
        "rounds": options.rounds,
    }
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    measured = []
    for place, case in enumerate(cases, start=1):
        result = _measure(case, options, f"{place}/{len(cases)} {case.name}")
        measured.append(_entry(case, result))
        _print(out, case, result)
    record = environment_and_options | extra | {"peak_memory_bytes": peak_memory_bytes(), "cases": measured}
    if options.output is not None:
        _write(record, options.output)
    if options.json:
        sys.stdout.write(json.dumps(record) + "\n")


def _measure(case: Case, options: Options, label: str) -> Result:
    stderr = Console(stderr=True)
    with (
        case.contest(options.seed) as contest,
        Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeRemainingColumn(),
            console=stderr,
            auto_refresh=False,  # its thread would draw in the middle of a turn
            transient=True,
            disable=not stderr.is_terminal,
        ) as progress,
    ):
        bar = progress.add_task(label, total=contest.num_turns(options.rounds) * len(contest.contenders))
        progress.refresh()

        def after_turn() -> None:
            progress.advance(bar)
            progress.refresh()

        return measure(contest, options.rounds, after_turn)


def _entry(case: Case, result: Result) -> dict[str, Any]:
    what = {"name": case.name, "measured": case.measured, "shape": case.shape}
    return what | ({"ours": result.ours} if result.ours else {}) | {"metrics": result.metrics()}


def _print(out: Console, case: Case, result: Result) -> None:
    metrics = list(dict.fromkeys(metric for each in result.seen.values() for metric in each))
    facts = [f"{name} {show(name, value)}" for name, value in result.facts.items()]
    table = Table(Column("", no_wrap=True), box=SIMPLE_HEAD)
    for metric in metrics:
        table.add_column(metric, justify="right", overflow="fold")
    if result.ratios:
        table.add_column(f"{result.ours} over it", justify="right")
    for name, each in result.seen.items():
        ratio = [_cell("x", result.ratios.get(name))] if result.ratios else []
        table.add_row(name, *(_cell(metric, each.get(metric)) for metric in metrics), *ratio)
    num_turns = max(spread.n for each in result.seen.values() for spread in each.values())
    out.print(f"{case.name}: measured {case.measured}, median (min .. max) of {num_turns}", markup=False)
    out.print("; ".join([show_shape("", case.shape), *facts]), markup=False)
    out.print(table)
    for bar, seen in result.bars.items():
        verdict = "holds" if seen.median >= bar.at_least else "does not hold"
        out.print(f"bar {bar.name}: {_cell('x', seen)}, at least {bar.at_least:g}x: {verdict}", markup=False)


def _cell(metric: str, spread: Spread | None) -> str:
    """A cell such as `1.05 s (1.04 .. 1.31)`; the unit stands once if all three values have the same."""
    if spread is None:
        return ""
    middle, low, high = (show(metric, value) for value in (spread.median, spread.min, spread.max))
    if low == high:
        return middle
    _, space, unit = middle.rpartition(" ")
    if space and low.endswith(space + unit) and high.endswith(space + unit):
        low, high = low.removesuffix(space + unit), high.removesuffix(space + unit)
    return f"{middle} ({low} .. {high})"


def _write(record: dict[str, Any], path: Path) -> None:
    if path.suffix == ".jsonl":
        records.append(path, [record])
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """Parse an option's count, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
