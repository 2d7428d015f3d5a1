"""A first look at what this machine makes of it, in some minutes: `make bench-quick`.

Three models of LLaMA-1B's shape with random weights read a prompt of 2K tokens: the plain one, and the first chains of
two CoLM-Air models, which are all that a prefill needs. Then a checkpoint writes token after token at each of its
scales, and answers through a cluster of its own. The other benchmarks measure the same at length.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from bench.decode.loaded import Models, Source
from bench.decode.step import DecodeCase
from bench.first_token import FirstTokenCase
from bench.harness.contest import Case, measure
from bench.harness.environment import environment
from bench.harness.markdown import replace_between, table
from bench.harness.suite import WIDTH_OF_A_FILE
from bench.harness.units import digits, duration, length
from bench.prefill.case import PrefillCase
from bench.prefill.memory import Prefill
from cluster.options import load_config
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
RECORD, PAGE = Path("bench/results/quick.json"), Path("README.md")
BEGIN, END = "<!-- bench.quick: begin -->", "<!-- bench.quick: end -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the table."""

    what: str
    seconds: float
    rate: str
    beside: str


def lines_of(record: Mapping[str, Any]) -> Iterator[Line]:
    """The table's lines: prefills, each scale's steps, then the cluster."""
    prefill, *decode, cluster = ({name: _median(each) for name, each in c["metrics"].items()} for c in record["cases"])
    times = {name: prefill[f"{name}_{length(PROMPT_TOKENS)}_s"] for name in PRESETS}
    plain_s = times[next(iter(PRESETS))]
    for name, what in PRESETS.items():
        rate, speed_up = PROMPT_TOKENS / times[name], plain_s / times[name]
        beside = "" if times[name] == plain_s else f"{digits(speed_up)}x as fast"
        yield Line(what=what, seconds=times[name], rate=f"{rate:,.0f} tokens/s", beside=beside)
    for scale, step in enumerate(decode, start=1):
        which = f"scale {scale}" + (", all chains" if scale == len(decode) else "")
        yield Line(
            what=f"the checkpoint writes a token at {which}",
            seconds=step["one_call_s"],
            rate=f"{1 / step['one_call_s']:,.0f} tokens/s",
            beside=f"{step['over_read_x']:.0%} of the speed of reading memory",
        )
    for num_tokens in FIRST_TOKENS:
        what = f"the first token after a prompt of {num_tokens}, through a cluster"
        yield Line(what=what, seconds=cluster[f"cluster_tokens{num_tokens}_s"], rate="", beside="")


def _median(metric: Any) -> float:
    return float(metric["median"] if isinstance(metric, Mapping) else metric)


def where(record: Mapping[str, Any]) -> str:
    """The machine, in words."""
    cpu = f"{record['cpu']} (family {record['cpu_family']}, model {record['cpu_model']})"
    return f"{cpu}, {record['threads']} threads, {record['date']}, medians of {record['rounds']}"


def markdown(record: Mapping[str, Any]) -> list[str]:
    """The README's part."""
    cells = [(each.what, duration(each.seconds), each.rate, each.beside) for each in lines_of(record)]
    return [f"{where(record)}, [record]({RECORD}):", "", *table(("", "time", "", ""), cells).splitlines()]


def cases(model: Path) -> Iterator[tuple[str, Case]]:
    """What runs, in the order of `lines_of`."""
    dtype = parse_dtype(load_config(None, {"model.path": model}).resolved_dtype)
    prefills = [Prefill(model=name, config=preset(name), num_tokens=PROMPT_TOKENS) for name in PRESETS]
    yield "reading a prompt", PrefillCase(prefills=prefills, dtype=dtype, tile_tokens=TILE_TOKENS)
    source, models = Source(str(model)), Models()
    for scale in range(1, source.config.num_chains + 1):
        yield (
            f"writing at scale {scale}",
            DecodeCase(source=source, num_chains=scale, context_len=PROMPT_TOKENS, models=models),
        )
    yield "a cluster", FirstTokenCase(model=model, state_dir=None, lengths=FIRST_TOKENS, dtype=dtype)


def measured(model: Path) -> dict[str, Any]:
    """Run the cases, one after the other; returns their record."""
    found = []
    for name, case in cases(model):
        sys.stderr.write(f"{name} ...\n")
        with case.contest(seed=0) as contest:
            result = measure(contest, ROUNDS)
        found.append({"name": case.name, "shape": case.shape, "metrics": result.metrics()})
    return {**environment(), "date": datetime.now(UTC).date().isoformat(), "rounds": ROUNDS, "cases": found}


def main() -> None:
    """Measure, and show the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.quick", description=__doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="a checkpoint")
    parser.add_argument("--json", action="store_true", help="end with one JSON record")
    parser.add_argument("--write-docs", action="store_true", help=f"keep the record in {RECORD}, its table in {PAGE}")
    options = parser.parse_args()
    record = measured(options.model)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    right = [Column(head, justify="right") for head in ("time", "")]
    shown = Table(Column("", no_wrap=True), *right, "", box=SIMPLE_HEAD)
    for each in lines_of(record):
        shown.add_row(each.what, duration(each.seconds), each.rate, each.beside)
    out.print(shown)
    out.print(where(record))
    if options.write_docs:
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        replace_between(PAGE, BEGIN, END, markdown(record))
    if options.json:
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
