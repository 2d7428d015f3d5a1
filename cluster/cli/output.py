"""Output of the commands: notes on stderr, results on stdout, one JSON object for programs."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from cluster.state import default_state_dir

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
StateDir = Annotated[
    Path, typer.Option(envvar="COLM_STATE_DIR", help="Where the cluster's address and tokens are kept.")
]
DEFAULT_STATE_DIR = default_state_dir()

INTERRUPTED = 130
"""Exit status that a shell expects of a command that Ctrl-C ended."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(record: Mapping[str, object]) -> None:
    """Print one JSON object as a line of stdout: the last one of a `--json` run."""
    typer.echo(json.dumps(record, ensure_ascii=False))


def note(text: str) -> None:
    """Print a progress message to stderr; stdout holds only the result."""
    typer.echo(text, err=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr during the block; yields a function to call with (done, total)."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def interruptible(word: str) -> Iterator[None]:
    """Turn a KeyboardInterrupt in the block into the end of the process: print `word`, exit with `INTERRUPTED`."""
    try:
        yield
    except KeyboardInterrupt:
        note(word)
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # an orderly exit would wait for threads of Ray's that were cut short, and may crash


def human_bytes(num_bytes: float) -> str:
    """A number of bytes in a unit that suits it, e.g. 23.4 KiB."""
    for unit in _UNITS[:-1]:
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} {_UNITS[-1]}"
