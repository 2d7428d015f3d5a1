"""A first look at what this machine makes of it, in some minutes: `make bench-quick`.

Three models of LLaMA-1B's shape with random weights read a prompt of 2K tokens: the plain one, and the first chains of
two CoLM-Air models, which are all that a prefill needs. Then a checkpoint writes token after token at each of its
scales, and answers through a cluster of its own. The other benchmarks measure the same at length.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from bench.decode import DecodeCase
from bench.first_token import FirstTokenCase
from bench.harness.contest import Case, Result, measure
from bench.harness.environment import environment
from bench.harness.suite import WIDTH_OF_A_FILE
from bench.harness.units import digits, duration, length
from bench.prefill.case import PrefillCase
from bench.prefill.memory import Prefill
from cluster.options import load_config
from colm.checkpoint import Checkpoint
from colm.defaults import TILE_TOKENS
from colm.dtypes import parse_dtype
from colm.model.presets import preset

PRESETS = {
    "llama-3.2-1b": "a plain LLaMA-1B reads 2K tokens",
    "llama-3.2-1b-16-16-air": "the first of two chains reads them",
    "llama-3.2-1b-8-8-8-8-air": "the first of four chains reads them",
}
PROMPT_TOKENS, ROUNDS = 2048, 3
FIRST_TOKENS = (16, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the table."""

    what: str
    seconds: float
    rate: str
    beside: str


def prefill_lines(result: Result) -> Iterator[Line]:
    """How long each model's prefill takes, and how many times as fast it is as the plain one."""
    times = {name: result.seen[f"{name}_{length(PROMPT_TOKENS)}"]["s"].median for name in PRESETS}
    plain_s = times[next(iter(PRESETS))]
    for name, what in PRESETS.items():
        speed_up = plain_s / times[name]
        yield Line(
            what=what,
            seconds=times[name],
            rate=f"{PROMPT_TOKENS / times[name]:,.0f} tokens/s",
            beside="" if times[name] == plain_s else f"{digits(speed_up)}x as fast",
        )


def decode_line(scale: int, num_chains: int, result: Result) -> Line:
    """How long a token takes at one scale."""
    seconds = result.seen["one_call"]["s"].median
    share = result.ratios["read"].median
    whole = ", all chains" if scale == num_chains else ""
    return Line(
        what=f"the checkpoint writes a token at scale {scale}{whole}",
        seconds=seconds,
        rate=f"{1 / seconds:,.0f} tokens/s",
        beside=f"{share:.0%} of the speed of reading memory",
    )


def first_token_lines(result: Result) -> Iterator[Line]:
    """How long the first token takes through a cluster."""
    for num_tokens in FIRST_TOKENS:
        seconds = result.seen["cluster"][f"tokens{num_tokens}_s"].median
        what = f"the first token after a prompt of {num_tokens}, through a cluster"
        yield Line(what=what, seconds=seconds, rate="", beside="")


def parts(model: Path) -> Iterator[tuple[str, Case, Callable[[Result], Iterator[Line]]]]:
    """What runs, and what becomes of it."""
    dtype = parse_dtype(load_config(None, {"model.path": model}).resolved_dtype)
    prefills = [Prefill(model=name, config=preset(name), num_tokens=PROMPT_TOKENS) for name in PRESETS]
    yield "reading a prompt", PrefillCase(prefills=prefills, dtype=dtype, tile_tokens=TILE_TOKENS), prefill_lines
    num_chains = Checkpoint.open(model).config.num_chains
    for scale in range(1, num_chains + 1):
        case = DecodeCase(model=model, num_chains=scale, context_len=PROMPT_TOKENS, dtype=torch.bfloat16, profile=False)

        def line(result: Result, scale: int = scale) -> Iterator[Line]:
            yield decode_line(scale, num_chains, result)

        yield f"writing at scale {scale}", case, line
    cluster = FirstTokenCase(model=model, state_dir=None, lengths=FIRST_TOKENS, dtype=dtype)
    yield "a cluster", cluster, first_token_lines


def main() -> None:
    """Measure the parts, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench.quick", description=__doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="a checkpoint")
    parser.add_argument("--json", action="store_true", help="end with one JSON record")
    options = parser.parse_args()
    lines: list[Line] = []
    cases: list[Mapping[str, object]] = []
    for name, case, lines_of in parts(options.model):
        sys.stderr.write(f"{name} ...\n")
        with case.contest(seed=0) as contest:
            result = measure(contest, ROUNDS)
        lines += lines_of(result)
        cases.append({"name": case.name, "shape": case.shape, "metrics": result.metrics()})
    where = environment()
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    right = [Column(head, justify="right") for head in ("time", "")]
    table = Table(Column("", no_wrap=True), *right, "", box=SIMPLE_HEAD)
    for each in lines:
        table.add_row(each.what, duration(each.seconds), each.rate, each.beside)
    out.print(table)
    out.print(f"{where['cpu']}, {where['threads']} threads, medians of {ROUNDS}; commit {str(where['commit'])[:7]}")
    if options.json:
        sys.stdout.write(json.dumps({**where, "rounds": ROUNDS, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
