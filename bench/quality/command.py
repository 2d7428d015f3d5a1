"""What the commands of this package have in common: options, the model, and how they end."""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from bench.harness.environment import environment
from bench.harness.suite import positive
from bench.harness.units import length, parse_length
from bench.quality.records import CellT, OutcomeT, Records
from cluster.cli.output import note
from colm.checkpoint import Checkpoint
from colm.errors import ColmError, ConfigError
from colm.text.tokenizer import Tokenizer

ROOT: Final = Path(__file__).parents[2]


class CommonOptions(argparse.Namespace):
    """Of every command."""

    model: Path
    threads: int | None
    record: Path
    docs: Path
    json: bool
    write_docs: bool


def common_parser(
    command: str, about: str | None, *, record: str, model: str = "SmolLM2-135M-Instruct"
) -> argparse.ArgumentParser:
    """A parser of `CommonOptions`, to which a command adds its own.

    Args:
        command: after `python -m`.
        about: the module's docstring.
        record: name of the file in bench/results.
        model: name of the default checkpoint in models.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=about)
    add = parser.add_argument
    add("--model", type=Path, default=Path("models") / model, metavar="DIR", help="a checkpoint")
    add("--threads", type=positive, help="of PyTorch and of the kernels; PyTorch's own setting")
    add("--record", type=Path, default=ROOT / "bench/results" / record, metavar="FILE", help="a line a cell")
    add("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="the folder of quality.md and of plots/")
    add("--json", action="store_true", help="end with one JSON object")
    add("--write-docs", action="store_true", help="write what is shown into the docs")
    return parser


def lengths(text: str) -> list[int]:
    """An option's lengths, e.g. `2K,8K`."""
    try:
        return [parse_length(each) for each in text.split(",")]
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def opened(options: CommonOptions) -> tuple[Checkpoint, Tokenizer]:
    """The model and its tokenizer, on as many threads as wanted.

    Raises:
        ColmError: the model cannot be read, or reads no text.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(options.model)
    tokenizer = Tokenizer.load(checkpoint)
    if tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer, so it cannot read a text")
    return checkpoint, tokenizer


def check_context(wanted: Sequence[int], checkpoint: Checkpoint) -> None:
    """Refuse texts beyond the model's context.

    Raises:
        ConfigError: names the longest.
    """
    if (longest := max(wanted)) > checkpoint.config.max_context:
        context = length(checkpoint.config.max_context)
        raise ConfigError(f"--lengths: {length(longest)} is beyond the model's context, {context}")


def run_missing(
    command: str, kept: Records[CellT, OutcomeT], wanted: Sequence[CellT], run: Callable[[CellT], OutcomeT]
) -> Mapping[str, Any]:
    """Run the cells that the record has not, one after the other; returns where and by what command."""
    seen = environment() | {"command": shlex.join(["python", "-m", command, *sys.argv[1:]])}
    missing = [cell for cell in wanted if cell not in kept.outcomes]
    for number, cell in enumerate(missing, start=1):
        note(f"{number}/{len(missing)} {cell}")
        kept.add(cell, run(cell), seen)
    return seen


def ending_well(run: Callable[[], None]) -> None:
    """Run a command; what a user can cause ends it with a line and exit status 1."""
    try:
        run()
    except (ColmError, ValueError) as err:
        note(f"error: {err}")
        raise SystemExit(1) from err
