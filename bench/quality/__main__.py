"""Quality of sparse prefill attention on a real model: `make model && python -m bench.quality --write-docs`.

Python's language reference with facts planted in it is prefilled, dense and sparse. A decode node's engine then reads
how the text goes on, which gives a perplexity, and is asked for each fact. Cells that the record has are not run again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench.harness.environment import environment
from bench.harness.suite import positive
from bench.harness.units import length, parse_length
from bench.quality.cells import BASELINE, BUDGETS, Budget, cells
from bench.quality.experiment import STRETCH, Experiment
from bench.quality.plot import write_plot
from bench.quality.records import Records
from bench.quality.report import print_table, rows, source_of, write_table
from bench.quality.text import PLACES, Corpus, paragraphs
from cluster.cli.output import note
from colm.checkpoint import Checkpoint
from colm.dtypes import dtype_name, fastest_dtype, parse_dtype
from colm.errors import ColmError, ConfigError
from colm.placement import CPU
from colm.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
_WIDTH_OF_A_FILE = 140


class QualityOptions(argparse.Namespace):
    """Of this benchmark."""

    model: Path
    lengths: list[int]
    attention: list[Budget] | None
    texts: int
    facts: int
    seed: int
    dtype: str
    threads: int | None
    record: Path
    docs: Path
    json: bool
    write_docs: bool


def main() -> None:
    """Run what is missing, then show everything."""
    options = parser().parse_args(namespace=QualityOptions())
    try:
        run(options)
    except (ColmError, ValueError) as err:
        note(f"error: {err}")
        raise SystemExit(1) from err


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), metavar="DIR", help="a checkpoint")
    add("--lengths", type=lengths, default="2K,4K,8K,16K,32K", help="of texts; longer than the context: with YaRN")
    add("--attention", type=budgets, metavar="NAMES", help="e.g. 'mass 0.9,keys 1024': only these, beside dense")
    add("--texts", type=positive, default=1, help="of each length; 1")
    add("--facts", type=positive, default=10, help=f"planted in each text, at most {len(PLACES)}; 10")
    add("--seed", type=int, default=0, help="of the facts; 0")
    add("--dtype", default=dtype_name(fastest_dtype(CPU)), help="of weights, keys and values")
    add("--threads", type=positive, help="of PyTorch and of the kernels; PyTorch's own setting")
    add("--record", type=Path, default=ROOT / "bench/results/quality.jsonl", metavar="FILE", help="a line a cell")
    add("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="the folder of quality.md and of plots/")
    add("--json", action="store_true", help="end with one JSON object")
    add("--write-docs", action="store_true", help="write table and plot into the docs; needs matplotlib")
    return parser


def lengths(text: str) -> list[int]:
    """An option's lengths, e.g. `2K,8K`."""
    try:
        return [parse_length(each) for each in text.split(",")]
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def budgets(text: str) -> list[Budget]:
    """An option's kinds of attention, by the names that the table has."""
    known = {str(budget): budget for budget in BUDGETS}
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; use some of {', '.join(known)}")
    return [known[name] for name in names]


def run(options: QualityOptions) -> None:
    """Everything that the options ask for.

    Raises:
        ColmError: the model cannot be read, or not at such a length.
        ValueError: an option's value is impossible.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(options.model)
    tokenizer = Tokenizer.load(checkpoint)
    if tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer, so it cannot read a text")
    max_context = checkpoint.config.max_context
    longest = int(STRETCH.factor * max_context)
    if max(options.lengths) > longest:
        raise ConfigError(
            f"--lengths: {length(max(options.lengths))} is beyond the stretched context, {length(longest)}"
        )
    experiment = Experiment(
        checkpoint,
        Corpus.of(paragraphs(), tokenizer.encode),
        tokenizer.encode,
        dtype=parse_dtype(options.dtype),
        seed=options.seed,
        num_facts=options.facts,
    )
    records = Records(options.record, experiment.setting)
    wanted = cells(options.lengths, num_texts=options.texts, max_context=max_context)
    chosen = BUDGETS if options.attention is None else options.attention
    missing = [cell for cell in wanted if cell.budget in (BASELINE, *chosen) and cell not in records.outcomes]
    seen = environment() | {"command": shlex.join(["python", "-m", "bench.quality", *sys.argv[1:]])}
    for number, cell in enumerate(missing, start=1):
        note(f"{number}/{len(missing)} {cell}")
        records.add(cell, experiment.run(cell), seen)
    found = rows(records.outcomes)
    print_table(Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE), found)
    if options.write_docs:
        source = source_of(experiment.setting, records.environments)
        write_plot(options.docs / "plots" / "quality.png", found, source)
        write_table(options.docs / "quality.md", found, source)
    if options.json:
        record = seen | {"setting": experiment.setting, "rows": [row.as_json() for row in found]}
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
