"""Open-loop load on a cluster and on one process that does both: `make model && python -m bench.serving --write-docs`.

Requests arrive when they are due, whether earlier ones are answered or not, and are sent over gRPC by the project's own
client. Each system is brought up alone, answers two requests that do not count, of which one is held against the plain
model, and is then put under the same windows of arrivals: every pattern at every rate, with prompts and answers of the
lengths that the options say, some prompts with a shared prefix. Each request has one outcome. Its times count from when
it was to arrive.

The reference is one process with the same engines, pages, gateway and defaults: one thread takes prompts first come,
first served, each whole, up to its first token, and all that wait before the answers go on.

The defaults take about ten minutes on two cores. A run that is killed leaves the windows that were over in the record,
and its systems stop by themselves.
"""

import argparse
import asyncio
import json
import math
import shlex
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.harness import records
from bench.harness.environment import environment
from bench.harness.suite import positive
from bench.serving import vllm
from bench.serving.arrivals import MIN_BURSTINESS
from bench.serving.check import check_greedy
from bench.serving.open_loop import run_trace
from bench.serving.outcome import Objective, Summary
from bench.serving.plot import check_plots, write_plot
from bench.serving.record import WindowRecord, last_run
from bench.serving.report import check_page, conditions, print_table, rows, write_docs
from bench.serving.systems import NAMES, Name, System, system
from bench.serving.trace import PATTERNS, Asked, Load, LogNormal, Pattern, Text, check_lengths, text_for, trace
from bench.serving.usage import Usage
from cluster.cli.output import interruptible, note
from cluster.options import load_config
from colm.checkpoint import Checkpoint
from colm.client import Client, collect
from colm.dtypes import parse_dtype
from colm.errors import ColmError, ConfigError
from colm.kv import KvFormat, fingerprint
from colm.sampling import SamplingParams

ROOT = Path(__file__).parents[2]
_WIDTH_OF_A_FILE = 190
_CHECKED_TOKENS = (48, 8)
"""Of the prompt and of the answer that are held against the model."""


class ServingOptions(argparse.Namespace):
    """Of this benchmark."""

    model: Path
    state_dir: Path | None
    systems: list[Name]
    patterns: list[Pattern]
    rates: list[float]
    seconds: float
    burst: int
    burstiness: float
    documents: LogNormal
    answers: LogNormal
    shared_fraction: float
    prefixes: int
    prefix_tokens: int
    ttft: float
    ttft_per_token: float
    tpot: float
    timeout: float
    rounds: int
    seed: int
    record: Path
    docs: Path
    json: bool
    write_docs: bool
    show: bool
    vllm_json: Path | None


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = Path("models/SmolLM2-135M-Instruct-9-3")
    add("--model", type=Path, default=model, metavar="DIR", help=f"checkpoint that is served; {model}")
    add("--state-dir", type=Path, metavar="DIR", help="of a cluster that runs; without, one is started and stopped")
    add("--systems", nargs="+", choices=NAMES, default=list(NAMES), help="which; both")
    add("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS), help="of arrivals; both")
    add("--rates", type=above_zero, nargs="+", default=[0.5, 1.0, 2.0], metavar="R", help="requests a second; 0.5 1 2")
    add("--seconds", type=above_zero, default=30.0, help="in which requests arrive, at each rate; 30")
    add("--burst", type=positive, default=5, help="requests that arrive together in a burst; 5")
    add_burstiness(parser)
    what = "log-normal MEDIAN,SIGMA,LOW,HIGH of"
    add("--documents", type=log_normal, default="256,0.9,32,2048", help=f"{what} prompt tokens; 256,0.9,32,2048")
    add("--answers", type=log_normal, default="24,0.6,4,64", help=f"{what} new tokens; 24,0.6,4,64")
    add("--shared-fraction", type=float, default=0.3, help="of the prompts begin with a shared prefix; 0.3")
    add("--prefixes", type=positive, default=4, help="shared prefixes; 4")
    add("--prefix-tokens", type=positive, default=128, help="of each shared prefix; 128")
    add("--ttft", type=float, default=1.0, metavar="S", help="objective: seconds to the first token, and; 1")
    add("--ttft-per-token", type=float, default=0.003, metavar="S", help="more seconds for each prompt token; 0.003")
    add("--tpot", type=above_zero, default=0.1, metavar="S", help="objective: seconds per token after the first; 0.1")
    add("--timeout", type=above_zero, default=60.0, metavar="S", help="after which an answer is worthless; 60")
    add("--rounds", type=positive, default=1, help="times that both systems take their turn, each with a trace; 1")
    add("--seed", type=int, default=0, help="of arrivals, lengths and texts; 0")
    add("--record", type=Path, default=ROOT / "bench/results/serving.jsonl", metavar="FILE", help="a line a window")
    add("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="the folder of serving.md and of plots/")
    add("--write-docs", action="store_true", help="write table and plot into the docs; needs matplotlib")
    add("--show", action="store_true", help="measure nothing: show the last run in the record")
    add("--vllm-json", type=Path, metavar="DIR", help="a file a window, in the JSON of `vllm bench serve`")
    add("--json", action="store_true", help="end with one JSON object")
    return parser


def add_burstiness(parser: argparse.ArgumentParser) -> None:
    """The option of everything that has arrivals."""
    what = "shape of the gamma distribution between arrivals, as vLLM has it: 1 is Poisson, less comes in clusters; 1"
    parser.add_argument("--burstiness", type=burstiness, default=1.0, metavar="B", help=what)


def burstiness(text: str) -> float:
    """Parse that option."""
    value = float(text)
    if not MIN_BURSTINESS <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {MIN_BURSTINESS:g} on")
    return value


def above_zero(text: str) -> float:
    """Parse an option's positive number."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def log_normal(text: str) -> LogNormal:
    """Parse an option's lengths."""
    try:
        return LogNormal.parse(text)
    except ValidationError as err:
        (first, *_) = err.errors()
        where = ".".join(map(str, first["loc"]))
        raise argparse.ArgumentTypeError(f"{text!r}: {f'{where}: ' if where else ''}{first['msg']}") from err
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def main() -> None:
    """Measure, or show what was measured."""
    options = parser().parse_args(namespace=ServingOptions())
    try:
        if options.write_docs:
            check_plots()
            check_page(options.docs / "serving.md")
        with interruptible("interrupted"):
            windows = last_run(options.record) if options.show else measure(options)
        if not windows:
            raise ConfigError(f"--record={options.record} has no run to show; leave out --show to measure one")
        show(windows, options)
    except (ColmError, ValueError) as err:
        note(f"error: {err}")
        raise SystemExit(1) from err


def show(windows: Sequence[WindowRecord], options: ServingOptions) -> None:
    """Print the table; write docs and files of JSON if asked.

    Raises:
        ConfigError: matplotlib is not there, or the page.
    """
    found, said = rows(windows), conditions(windows)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    print_table(out, found)
    for each in said:
        out.print(each, markup=False)
    if options.write_docs:
        plot = options.docs / "plots" / "serving.svg"
        write_plot(plot, found, " ".join(said))
        write_docs(
            options.docs / "serving.md", found, windows, f"../bench/results/{options.record.name}", f"plots/{plot.name}"
        )
    if options.vllm_json is not None:
        vllm.write(options.vllm_json, windows)
    if options.json:
        record = windows[0].environment | {
            "run": windows[0].run,
            "measured": windows[0].measured,
            "objective": windows[0].objective.model_dump(),
            "rows": [row.as_json() for row in found],
        }
        sys.stdout.write(json.dumps(record) + "\n")


def measure(options: ServingOptions) -> list[WindowRecord]:
    """Run all windows, and append each to the record as it ends.

    Raises:
        ColmError: a system did not start, or is another than was asked for.
        ValueError: an option's value is impossible.
        AssertionError: a system answers wrongly; nothing has been timed.
    """
    checkpoint = Checkpoint.open(options.model)
    loads, objective = plan(options)
    check_lengths(loads[0], checkpoint)
    bench = _Bench(options, checkpoint, loads, objective)
    windows: list[WindowRecord] = []
    for number in range(options.rounds):
        for name in options.systems:
            # Closed however the loop is left: the system then stops, and nothing waits for it in vain.
            with closing(bench.windows(name, number)) as turn:
                for window in turn:
                    records.append(options.record, [window.model_dump(mode="json")])
                    windows.append(window)
    return windows


def plan(options: ServingOptions) -> tuple[list[Load], Objective]:
    """The loads in their order, and the objective.

    Raises:
        ConfigError: a value is impossible; names the option.
    """
    try:
        loads = [
            Load(
                pattern=pattern,
                rate_per_s=rate,
                seconds=options.seconds,
                burst_size=options.burst,
                burstiness=options.burstiness,
                documents=options.documents,
                answers=options.answers,
                shared_fraction=options.shared_fraction,
                num_prefixes=options.prefixes,
                prefix_tokens=options.prefix_tokens,
            )
            for pattern in options.patterns
            for rate in sorted(options.rates)
        ]
        objective = Objective(first_s=options.ttft, first_s_per_token=options.ttft_per_token, token_s=options.tpot)
    except ValidationError as err:
        (first, *_) = err.errors()
        option = _OPTION_OF[str(first["loc"][0])]
        raise ConfigError(f"{option}={first['input']!r}: {first['msg']}") from err
    return loads, objective


_OPTION_OF = {
    "shared_fraction": "--shared-fraction",
    "first_s": "--ttft",
    "first_s_per_token": "--ttft-per-token",
}


class _Bench:
    """All that the windows of one run have in common."""

    def __init__(
        self, options: ServingOptions, checkpoint: Checkpoint, loads: Sequence[Load], objective: Objective
    ) -> None:
        self._options = options
        self._checkpoint = checkpoint
        self._loads = loads
        self._objective = objective
        self._text: Text = text_for(checkpoint)
        config = load_config(None, {"model.path": options.model})
        self._dtype_name = config.resolved_dtype
        self._dtype = parse_dtype(self._dtype_name)
        self._num_begun = 0
        self._run = datetime.now(UTC).isoformat(timespec="seconds")
        self._environment: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "bench.serving", *sys.argv[1:]]),
            "date": self._run,
            **environment(),
        }

    def windows(self, name: Name, number: int) -> Generator[WindowRecord]:
        """One system's turn in a round: it is up only for this."""
        options = self._options
        with system(name, options.model, options.state_dir) as found:
            self._warm_up(found)
            for load in self._loads:
                asked = trace(load, self._text, [options.seed, number, PATTERNS.index(load.pattern)])
                yield self._window(found, load, asked, number)

    def _warm_up(self, found: System) -> None:
        """Two requests that do not count: a short one that is held against the model, and a long one."""
        config, served = self._checkpoint.config, found.model()
        wanted = fingerprint(self._checkpoint, KvFormat.of(config, self._dtype))  # which says nothing of later chains
        if (served.fingerprint, served.chains) != (wanted, config.chains):
            raise ConfigError(
                f"--state-dir={self._options.state_dir}: that cluster serves another model than --model="
                f"{self._options.model} in {self._dtype_name}; name the one that it serves, or leave out --state-dir"
            )
        num_prompt_tokens, num_new_tokens = _CHECKED_TOKENS
        asked = trace(self._loads[0], self._text, [self._options.seed])
        prompt_N = max((each.token_ids_N for each in asked), key=len)
        greedy = SamplingParams(ignore_eos=True)
        with Client(found.address, found.security) as client:
            short_N = prompt_N[:num_prompt_tokens]
            short = collect(client.generate(token_ids=short_N, max_new_tokens=num_new_tokens, sampling=greedy))
            collect(client.generate(token_ids=prompt_N, max_new_tokens=num_new_tokens, sampling=greedy))
        check_greedy(self._checkpoint, self._dtype, short_N, [token.token_id for token in short.tokens])

    def _window(self, found: System, load: Load, asked: Sequence[Asked], number: int) -> WindowRecord:
        options = self._options
        self._num_begun += 1
        total = options.rounds * len(options.systems) * len(self._loads)
        label = f"{self._num_begun}/{total} {found.name}, {load.pattern} {load.rate_per_s:g}/s"
        processes = found.processes() | {"client": [psutil.Process()]}
        with _progress(label, len(asked)) as ended, Usage(processes) as usage:
            sending = run_trace(found.address, found.security, asked, timeout_s=options.timeout, ended=ended)
            requests = asyncio.run(sending)
        return WindowRecord(
            environment=self._environment,
            run=self._run,
            system=found.name,
            model=options.model.name,
            dtype=self._dtype_name,
            round=number,
            seed=options.seed,
            timeout_s=options.timeout,
            load=load,
            objective=self._objective,
            busy_s=max(each.at_s + each.total_s for each in requests),
            usage=usage.roles(),
            requests=requests,
            summary=Summary.of(requests, self._objective, load.seconds),
        )


@contextmanager
def _progress(label: str, total: int) -> Iterator[Any]:
    """A bar on a terminal, else a line before and after; yields what is called as a request ends."""
    stderr = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        refresh_per_second=1,
        transient=True,
        disable=not stderr.is_terminal,
    ) as progress:
        bar = progress.add_task(label, total=total)
        if not stderr.is_terminal:
            note(f"{label}: {total} requests")
        yield lambda: progress.advance(bar)


if __name__ == "__main__":
    main()
