"""A large cluster, simulated: `python -m bench.simulate run --prefill 8 --decode 32 --rate 100`.

The cluster's own placement, lenders, scheduler, pages, prefill policy and cost model run under a clock that jumps; what
engines, network and Ray Serve take is modelled. docs/simulate.md says what is real, what is modelled, and how far off
it is.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.harness.suite import positive
from bench.roofline.machine import FOLDER, machine
from bench.serving.__main__ import above_zero, log_normal
from bench.serving.trace import LogNormal
from bench.simulate.cluster import ClusterPlan, Simulated, run
from bench.simulate.costs import MachineCosts
from bench.simulate.figures import Figures, print_figures
from bench.simulate.sizing import decode_limits, prefill_limits
from bench.simulate.workload import PATTERNS, Pattern, Workload
from colm import defaults
from colm.errors import ConfigError
from colm.model.presets import preset

GPU_TILE_TOKENS: Final = 8192


class SimulateOptions(argparse.Namespace):
    """Of the command."""

    preset: str
    machine: str
    memory_gib: float
    tile_tokens: int
    batch: int
    prefill: int
    decode: int
    network_gbit: float
    lease_ms: float
    rate: float
    requests: int
    pattern: Pattern
    burst: int
    prompts: LogNormal
    answers: LogNormal
    chains: int | None
    seed: int
    json: bool


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    of_run = commands.add_parser("run", help="one cluster under one workload")
    of_run.set_defaults(command=run_once)
    add = of_run.add_argument
    machines = sorted(path.stem for path in FOLDER.glob("*.toml"))
    add("--preset", default="llama-3.1-8b-8-8-8-8-air", metavar="NAME", help="model; llama-3.1-8b-8-8-8-8-air")
    add("--machine", choices=machines, default="h100", help="of every replica, see bench/roofline/machines; h100")
    add("--memory-gib", type=above_zero, default=80.0, metavar="GIB", help="of every replica's device; 80")
    add("--tile-tokens", type=positive, default=GPU_TILE_TOKENS, metavar="N", help="of prefill; 8192")
    add("--batch", type=positive, default=defaults.MAX_BATCH_SIZE, metavar="N", help="decode.max_batch_size; 32")
    add("--prefill", type=positive, default=1, metavar="N", help="prefill replicas; 1")
    add("--decode", type=positive, default=1, metavar="N", help="decode replicas; 1")
    add("--network-gbit", type=above_zero, default=100.0, metavar="G", help="Gb/s of each replica's link; 100")
    add("--lease-ms", type=float, default=1.0, metavar="MS", help="what asking Ray Serve for a replica takes; 1")
    add("--rate", type=above_zero, default=1.0, metavar="R", help="requests a second; 1")
    add("--requests", type=positive, default=1000, metavar="N", help="that arrive; 1000")
    add("--pattern", choices=PATTERNS, default="poisson", help="of arrivals; poisson")
    add("--burst", type=positive, default=8, metavar="N", help="requests that arrive together in a burst; 8")
    what = "log-normal MEDIAN,SIGMA,LOW,HIGH of"
    add("--prompts", type=log_normal, default="1024,1,16,32768", metavar="LENGTHS", help=f"{what} prompt tokens")
    add("--answers", type=log_normal, default="128,0.8,1,2048", metavar="LENGTHS", help=f"{what} new tokens")
    add("--chains", type=positive, metavar="N", help="that make the answers; all")
    add("--seed", type=int, default=0, help="of arrivals, lengths and Ray Serve's choices; 0")
    add("--json", action="store_true", help="end with one JSON object")
    return parser


def main() -> None:
    """Run one of the commands."""
    options = parser().parse_args(namespace=SimulateOptions())
    try:
        options.command(options)
    except (ConfigError, ValueError) as err:
        sys.stderr.write(f"error: {err}\n")
        raise SystemExit(1) from err


def run_once(options: SimulateOptions) -> None:
    """Simulate one cluster, and print what came of it."""
    simulated = simulate_options(options)
    figures = Figures.of(simulated)
    print_figures(Console(highlight=False), figures)
    if options.json:
        asked = {name: str(value) if isinstance(value, LogNormal) else value for name, value in vars(options).items()}
        asked.pop("command")
        sys.stdout.write(json.dumps({"modelled": True, "options": asked, "figures": asdict(figures)}) + "\n")


def simulate_options(options: SimulateOptions) -> Simulated:
    """What the options describe.

    Raises:
        ConfigError: a value is impossible; says which option.
    """
    config = preset(options.preset)
    num_chains = config.num_chains if options.chains is None else options.chains
    if num_chains > config.num_chains:
        raise ConfigError(f"--chains={num_chains}: {options.preset} has {config.num_chains}")
    memory_bytes = int(options.memory_gib * (1 << 30))
    decode = decode_limits(config, memory_bytes, max_batch_size=options.batch)
    plan = ClusterPlan(
        config=config,
        num_prefill=options.prefill,
        num_decode=options.decode,
        prefill=prefill_limits(config, memory_bytes),
        decode=decode,
        link_bytes_per_s=options.network_gbit * 1e9 / 8,
        max_streams=defaults.MAX_STREAMS,
        max_requests=decode.max_requests * options.decode,
        lease_s=options.lease_ms / 1e3,
    )
    workload = Workload(
        rate_per_s=options.rate,
        num_requests=options.requests,
        prompts=options.prompts,
        answers=options.answers,
        num_chains=num_chains,
        max_context=min(config.max_context, decode.num_pages * decode.page_tokens),
        pattern=options.pattern,
        burst_size=options.burst,
    )
    costs = MachineCosts(machine=machine(options.machine), config=config, tile_tokens=options.tile_tokens)
    with progress("simulated requests", options.requests) as ended:
        return run(plan, costs, workload.requests(options.seed), seed=options.seed, ended=ended)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; yields what is called as each of so many has ended."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


if __name__ == "__main__":
    main()
