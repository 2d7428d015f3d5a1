"""Large clusters, simulated: `python -m bench.simulate run --prefill 2 --decode 6 --rate 20`.

The cluster's own placement, lenders, scheduler, pages, prefill policy and cost model run under a clock that jumps; what
engines, network and Ray Serve take is modelled. `run` simulates one cluster; `plan` finds the fewest replicas that keep
an objective; `check` compares with a real cluster of two nodes. docs/simulate.md says what is real, what is modelled,
and what came out.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.harness.environment import environment
from bench.harness.suite import positive
from bench.harness.units import digits, duration
from bench.serving.__main__ import above_zero
from bench.serving.arrivals import in_words
from bench.serving.plot import check_plots
from bench.simulate.cluster import Ended
from bench.simulate.figures import Figures, print_figures
from bench.simulate.options import Question, SimulateOptions, add_common, lengths
from bench.simulate.planner import Objective, plan
from bench.simulate.record import COLUMNS, PlanRecord, PlanRow, store, write_docs
from bench.simulate.scaling import ScalingPlan, scalings, write_plot
from colm.errors import ColmError


class RunOptions(SimulateOptions):
    """Of `run`."""

    prefill: int
    decode: int
    network_gbit: float
    max_prefill: int | None
    max_decode: int | None
    start_s: float
    plot: Path | None


class PlanOptions(SimulateOptions):
    """Of `plan`."""

    networks: list[float]
    objectives: list[Objective]
    write_docs: bool


class CheckOptions(argparse.Namespace):
    """Of `check`."""

    model: Path
    state_dir: Path | None
    load: float
    seconds: float
    seed: int
    json: bool


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    of_run = commands.add_parser("run", help="one cluster under one workload")
    of_run.set_defaults(command=run_once)
    add = of_run.add_argument
    add("--prefill", type=positive, default=1, metavar="N", help="prefill replicas; 1")
    add("--decode", type=positive, default=1, metavar="N", help="decode replicas; 1")
    add("--network-gbit", type=above_zero, default=100.0, metavar="G", help="Gb/s of each replica's link; 100")
    add("--max-prefill", type=positive, metavar="N", help="most that the load may bring; by default their number stays")
    add("--max-decode", type=positive, metavar="N", help="likewise, of decode replicas")
    add("--start-s", type=above_zero, default=60.0, metavar="S", help="until a replica that is wanted serves; 60")
    add("--plot", type=Path, metavar="FILE", help="draw the replicas over time; needs matplotlib")
    add_common(of_run, num_requests=1000)
    of_plan = commands.add_parser("plan", help="the fewest replicas that keep an objective")
    of_plan.set_defaults(command=plan_all)
    add = of_plan.add_argument
    add("--networks", type=above_zero, nargs="+", default=[25.0, 100.0, 400.0], metavar="G", help="Gb/s; 25 100 400")
    what = "TTFT_S,TPOT_S[,PERCENT]: so many in 100 have both; 1,0.05,95"
    default = [Objective(ttft_s=1.0, tpot_s=0.05)]
    add("--objectives", type=objective, nargs="+", default=default, metavar="OBJECTIVE", help=what)
    add("--write-docs", action="store_true", help="keep the record, write table and plot into docs/simulate.md")
    add_common(of_plan, num_requests=3000)
    of_check = commands.add_parser("check", help="beside a real cluster of one prefill and one decode node")
    of_check.set_defaults(command=check_once)
    add = of_check.add_argument
    add("model", type=Path, help="a checkpoint's directory")
    add("--state-dir", type=Path, metavar="DIR", help="of a cluster that runs; without, one is started and stopped")
    add("--load", type=above_zero, default=0.6, help="share of the machine that the requests need one by one; 0.6")
    add("--seconds", type=above_zero, default=420.0, help="in which they arrive; 420")
    add("--seed", type=int, default=0, help="of arrivals, lengths and texts; 0")
    add("--json", action="store_true", help="end with one JSON object")
    return parser


def objective(text: str) -> Objective:
    """Parse an option's objective."""
    try:
        return Objective.parse(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def main() -> None:
    """Run one of the commands."""
    options = parser().parse_args(namespace=SimulateOptions())
    try:
        options.command(options)
    except (ColmError, ValueError) as err:
        sys.stderr.write(f"error: {err}\n")
        raise SystemExit(1) from err


def run_once(options: RunOptions) -> None:
    """Simulate one cluster, and print what came of it."""
    question = Question.of(options).scaled(
        ScalingPlan(
            pools=scalings(options.prefill, options.max_prefill, options.decode, options.max_decode),
            start_s=options.start_s,
        )
    )
    with progress("simulated requests", options.requests) as ended:
        simulated = question.ask(options.prefill, options.decode, options.network_gbit, ended)
    figures = Figures.of(simulated)
    print_figures(Console(highlight=False), figures)
    if options.plot is not None:
        write_plot(options.plot, simulated.looks)
    if options.json:
        record = {"modelled": True, "command": command(), "commit": environment()["commit"], "figures": asdict(figures)}
        sys.stdout.write(json.dumps(record) + "\n")


def plan_all(options: PlanOptions) -> None:
    """Find the replicas for each objective behind each network.

    Raises:
        ConfigError: docs are to be written, and matplotlib is not installed.
    """
    if options.write_docs:
        check_plots()
    question, rows = Question.of(options), list[PlanRow]()
    err = Console(stderr=True, highlight=False)
    for each in options.objectives:
        for network_gbit in options.networks:
            found = plan(question, network_gbit, each, err.print)
            rows.append(
                PlanRow(
                    objective=str(each),
                    network_gbit=network_gbit,
                    num_prefill=None if found is None else found.num_prefill,
                    num_decode=None if found is None else found.num_decode,
                    figures=None if found is None else asdict(found.figures),
                )
            )
    prompts, answers = lengths(options)
    of_trace = f"lengths of {options.shape}" if options.shape else f"prompt tokens {prompts}, new tokens {answers}"
    arrivals = in_words(options.pattern, options.burstiness)
    environs = environment()
    record = PlanRecord(
        command=command(),
        commit=environs["commit"],
        dirty=environs["dirty"],
        question=(
            f"{options.preset} on replicas of {question.costs.machine.name}, {options.rate:g} requests a second "
            f"({arrivals}), {of_trace}, {question.workload.num_chains} chains, seed {options.seed}."
        ),
        rows=rows,
    )
    table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row.words())
    Console(highlight=False, width=None if sys.stdout.isatty() else 170).print(table)
    if options.write_docs:
        store(record)
        write_docs(record)
    if options.json:
        sys.stdout.write(record.model_dump_json() + "\n")


def check_once(options: CheckOptions) -> None:
    """Compare with a real cluster, and print both sides."""
    from bench.simulate.check import WITHIN, check  # brings in Ray and the nodes

    err = Console(stderr=True, highlight=False)
    found = check(
        options.model,
        options.state_dir,
        load=options.load,
        seconds=options.seconds,
        seed=options.seed,
        tell=err.print,
    )
    table = Table("figure", "real", "simulated", "ratio", "95% of it", "", box=SIMPLE_HEAD, pad_edge=False)
    for each in found.pairs:
        show = duration if each.name.split()[0].endswith("_s") else digits
        interval = f"{each.low:.2f} .. {each.high:.2f}"
        table.add_row(each.name, show(each.real), show(each.simulated), f"{each.ratio:.2f}", interval, each.verdict)
    out = Console(highlight=False)
    out.print(table)
    num_within = sum(each.is_within for each in found.pairs)
    out.print(
        f"{found.num_requests} requests at {found.rate_per_s:.2f} a second; {num_within} of {len(found.pairs)} figures "
        f"are within {WITHIN:.0%}"
    )
    if options.json:
        record = {
            "command": command(),
            **environment(),
            "rate_per_s": found.rate_per_s,
            "num_requests": found.num_requests,
            "costs": asdict(found.costs),
            "pairs": [asdict(each) | {"ratio": each.ratio, "verdict": each.verdict} for each in found.pairs],
        }
        sys.stdout.write(json.dumps(record) + "\n")


def command() -> str:
    """What was called."""
    return shlex.join(["python", "-m", "bench.simulate", *sys.argv[1:]])


@contextmanager
def progress(label: str, total: int) -> Iterator[Ended]:
    """A bar on a terminal; yields what is told of each request that has ended, of so many."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda _: bar.advance(task)


if __name__ == "__main__":
    main()
