"""A million tokens through a prefill node: `python -m bench.million --json --output FILE.jsonl`.

A node in a process of its own, with random weights of chain 1, sends every tile over gRPC; this process reads, verifies
and acknowledges as a decode node does, and keeps a part, which is held against the model's definition. A short prompt
comes when half of the long one has arrived. The time of everything, plans and audits and the stream among it, is held
against the products that are needed at 0.6 of the rate of a matrix product; the node's memory against 6 GiB.

Random weights attend so evenly that no budget recalls much, so the audit only reports, unless --audit-floor says more;
for the same reason a share of the attention (--mass) lists nearly everything, and such layers become dense: at 1M that
is a day's work.

A cell that is in --output already is not run again.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench.harness import records as jsonl
from bench.harness.environment import environment
from bench.harness.suite import Options, arguments, positive
from bench.harness.units import digits, duration, length
from bench.million.cell import Cell, measure
from bench.prefill.__main__ import DTYPES, lengths, model
from cluster.cli.output import human_bytes
from colm.dtypes import dtype_name, fastest_dtype
from colm.model.config import ChainConfig
from colm.placement import CPU
from prefill_node.sparse.policy import AuditPolicy, SparsePolicy

TILE_TOKENS = 2048
"""Four times a node's default: of long prompts alone, larger tiles are faster."""
PRESET = "llama-3.2-1b-8-8-8-8-air"


class MillionOptions(Options):
    """Of this benchmark."""

    preset: tuple[str, ChainConfig]
    tokens: list[int]
    attention: list[str]
    keys_per_row: int | None
    mass: float | None
    audit_floor: float
    dtype: str
    tile_tokens: int


def main() -> None:
    """Every length with every kind of attention."""
    parser = arguments("bench.million", __doc__, rounds=1)
    parser.add_argument("--preset", type=model, default=PRESET, help=f"a name of colm.model.presets.PRESETS; {PRESET}")
    parser.add_argument("--tokens", type=lengths, default="1M", help="of prompts, e.g. 128K,256K; 1M")
    parser.add_argument("--attention", nargs="+", choices=("sparse", "dense"), default=["sparse"], help="sparse")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keys-per-row", type=positive, help="keys that sparse attention gives a row; 4096")
    budget.add_argument("--mass", type=float, help="share of the attention that it keeps instead")
    parser.add_argument("--audit-floor", type=float, default=0.0, help="recall below which heads become dense; 0")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype_name(fastest_dtype(CPU)), help="of the node")
    parser.add_argument("--tile-tokens", type=positive, default=TILE_TOKENS, help=f"of the node; {TILE_TOKENS}")
    options = parser.parse_args(namespace=MillionOptions())
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name, config = options.preset
    try:
        keys_per_row = 4096 if options.keys_per_row is None and options.mass is None else options.keys_per_row
        policy = SparsePolicy(mass=options.mass, keys_per_row=keys_per_row)
        audit = AuditPolicy(floor=options.audit_floor)
    except ValueError as err:
        parser.error(str(err))
    cells = [
        Cell(
            preset=name,
            config=config,
            num_tokens=num_tokens,
            attention="sparse" if attention == "sparse" else "dense",
            policy=policy,
            audit=audit,
            dtype=DTYPES[options.dtype],
            tile_tokens=options.tile_tokens,
            seed=options.seed,
        )
        for num_tokens in options.tokens
        for attention in options.attention
    ]
    run_all(cells, options)


def run_all(cells: list[Cell], options: MillionOptions) -> None:
    """Run what is not in the output yet; print a table, and the records if asked."""
    out, done = Console(highlight=False, width=140), finished(options.output)
    records = []
    for cell in cells:
        if (record := next((each for each in done if each["cell"] == cell.key), None)) is None:
            record = {
                "command": shlex.join(["python", "-m", options.module, *sys.argv[1:]]),
                **environment(),
                "measured": "whole",
                "cell": cell.key,
                **watched(cell),
            }
            if options.output is not None:
                jsonl.append(options.output, [record])
        records.append(record)
    out.print(table(records))
    if options.json:
        sys.stdout.write(json.dumps(records if len(records) > 1 else records[0]) + "\n")


def watched(cell: Cell) -> dict[str, Any]:
    """Measure a cell behind a progress bar."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=1,
    ) as progress:
        bar = progress.add_task(f"{length(cell.num_tokens)} {cell.attention}", total=cell.num_tokens)
        return measure(cell, lambda num_done: progress.update(bar, completed=num_done))


def finished(output: Path | None) -> list[dict[str, Any]]:
    """The records of cells that a file holds."""
    return [] if output is None else [record for record in jsonl.read(output) if "cell" in record]


def table(records: list[dict[str, Any]]) -> Table:
    """A row a cell."""
    rows = Table(box=SIMPLE_HEAD)
    for column in ("", "time", "bar", "of GEMM", "tokens/s", "short prompt", "its bar", "peak memory", "met"):
        rows.add_column(column, justify="right")
    for record in records:
        rows.add_row(
            f"{length(record['cell']['num_tokens'])} {record['cell']['attention']}",
            duration(record["total_s"]),
            duration(record["bar_s"]),
            digits(record["gemm_fraction"]),
            digits(record["tokens_per_s"]),
            duration(record["short_s"]),
            duration(record["short_bar_s"]),
            human_bytes(record["node_peak_bytes"]),
            ", ".join(name for name, is_met in record["met"].items() if is_met) or "none",
        )
    return rows


if __name__ == "__main__":
    main()
