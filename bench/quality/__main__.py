"""Quality of sparse prefill attention on a real model: `make model && python -m bench.quality`.

Python's language reference with facts planted in it is prefilled, dense and sparse. A decode node's engine then reads
how the text goes on, which gives a perplexity, and is asked for each fact. Cells that the record has are not run again.
"""

import argparse
import shlex
import sys
from pathlib import Path

from bench.harness.environment import environment
from bench.harness.suite import positive
from bench.harness.units import length, parse_length
from bench.quality.cells import cells
from bench.quality.experiment import STRETCH, Experiment
from bench.quality.records import Records
from bench.quality.text import PLACES, Corpus, paragraphs
from cluster.cli.output import note
from colm.checkpoint import Checkpoint
from colm.dtypes import dtype_name, fastest_dtype, parse_dtype
from colm.errors import ColmError, ConfigError
from colm.placement import CPU
from colm.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


class QualityOptions(argparse.Namespace):
    """Of this benchmark."""

    model: Path
    lengths: list[int]
    texts: int
    facts: int
    seed: int
    dtype: str
    record: Path


def main() -> None:
    """Run what is missing."""
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
    add("--texts", type=positive, default=1, help="of each length; 1")
    add("--facts", type=positive, default=10, help=f"planted in each text, at most {len(PLACES)}; 10")
    add("--seed", type=int, default=0, help="of the facts; 0")
    add("--dtype", default=dtype_name(fastest_dtype(CPU)), help="of weights, keys and values")
    add("--record", type=Path, default=ROOT / "bench/results/quality.jsonl", metavar="FILE", help="a line a cell")
    return parser


def lengths(text: str) -> list[int]:
    """An option's lengths, e.g. `2K,8K`."""
    try:
        return [parse_length(each) for each in text.split(",")]
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def run(options: QualityOptions) -> None:
    """Everything that the options ask for.

    Raises:
        ColmError: the model cannot be read, or not at such a length.
        ValueError: an option's value is impossible.
    """
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
    missing = [cell for cell in wanted if cell not in records.outcomes]
    seen = environment() | {"command": shlex.join(["python", "-m", "bench.quality", *sys.argv[1:]])}
    for number, cell in enumerate(missing, start=1):
        note(f"{number}/{len(missing)} {cell}")
        records.add(cell, experiment.run(cell), seen)


if __name__ == "__main__":
    main()
