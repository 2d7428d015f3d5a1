"""Quality of sparse prefill attention on a real model: `make model && python -m bench.quality --write-docs`.

Python's language reference with facts planted in it is prefilled, dense and sparse. A decode node's engine then reads
how the text goes on, which gives a perplexity, and is asked for each fact. Cells that the record has are not run again.
"""

import argparse
import json
import sys

from rich.console import Console

from bench.harness.suite import positive
from bench.harness.units import length
from bench.quality.cells import BASELINE, BUDGETS, Budget, Cell, cells
from bench.quality.command import CommonOptions, common_parser, ending_well, lengths, opened, run_missing
from bench.quality.experiment import STRETCH, Experiment, Outcome
from bench.quality.plot import write_plot
from bench.quality.records import Records
from bench.quality.report import print_table, rows, source_of, write_table
from bench.quality.text import PLACES, Corpus, paragraphs
from colm.dtypes import dtype_name, fastest_dtype, parse_dtype
from colm.errors import ConfigError
from colm.placement import CPU

_WIDTH_OF_A_FILE = 140
_COMMAND = "bench.quality"


class QualityOptions(CommonOptions):
    """Of this benchmark."""

    lengths: list[int]
    attention: list[Budget] | None
    texts: int
    facts: int
    seed: int
    dtype: str


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = common_parser(_COMMAND, __doc__, record="quality.jsonl")
    add = parser.add_argument
    add("--lengths", type=lengths, default="2K,4K,8K,16K,32K", help="of texts; longer than the context: with YaRN")
    add("--attention", type=budgets, metavar="NAMES", help="e.g. 'mass 0.9,keys 1024': only these, beside dense")
    add("--texts", type=positive, default=1, help="of each length; 1")
    add("--facts", type=positive, default=10, help=f"planted in each text, at most {len(PLACES)}; 10")
    add("--seed", type=int, default=0, help="of the facts; 0")
    add("--dtype", default=dtype_name(fastest_dtype(CPU)), help="of weights, keys and values")
    return parser


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
    checkpoint, tokenizer = opened(options)
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
    records = Records(options.record, experiment.setting, Cell, Outcome)
    every = cells(options.lengths, num_texts=options.texts, max_context=max_context)
    chosen = BUDGETS if options.attention is None else options.attention
    wanted = [cell for cell in every if cell.budget in (BASELINE, *chosen)]
    seen = run_missing(_COMMAND, records, wanted, experiment.run)
    found = rows(records.outcomes)
    print_table(Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE), found)
    if options.write_docs:
        source = source_of(experiment.setting, records.environments)
        write_plot(options.docs / "plots" / "quality.png", found, source)
        write_table(options.docs / "quality.md", found, source)
    if options.json:
        record = {**seen, "setting": experiment.setting, "rows": [row.as_json() for row in found]}
        sys.stdout.write(json.dumps(record) + "\n")


def main() -> None:
    """Run what is missing, then show everything."""
    options = parser().parse_args(namespace=QualityOptions())
    ending_well(lambda: run(options))


if __name__ == "__main__":
    main()
