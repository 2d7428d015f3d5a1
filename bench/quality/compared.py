"""What the experiments have in common that read one text in two ways."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness.markdown import replace_between, table
from bench.quality.cells import NUM_CONTINUED
from bench.quality.command import CommonOptions
from bench.quality.experiment import NUM_SCORED
from bench.quality.text import Corpus
from colm.checkpoint import Checkpoint, backbone_digest


def setting_of(checkpoint: Checkpoint, corpus: Corpus) -> dict[str, Any]:
    """What all outcomes of a model and a text have in common."""
    return {
        "model": checkpoint.path.name,
        "backbone_sha256": backbone_digest(checkpoint),
        "text_sha256": corpus.sha256,
        "num_scored": NUM_SCORED,
    }


def prompt_and_continuation(corpus: Corpus, num_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The corpus's last tokens: what is prefilled, and how the text goes on.

    Raises:
        ValueError: the corpus has no such text.
    """
    if not NUM_CONTINUED < num_tokens <= len(corpus.token_ids_N):
        raise ValueError(f"num_tokens={num_tokens} must be above {NUM_CONTINUED} and within the corpus")
    text_N = corpus.token_ids_N[-num_tokens:]
    return text_N[:-NUM_CONTINUED], text_N[-NUM_CONTINUED:]


def show(
    options: CommonOptions,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    marks: tuple[str, str],
    source: str,
    record: Mapping[str, Any],
) -> None:
    """Print the table; write it between its marks of quality.md and end with the record, as far as asked for.

    Raises:
        ConfigError: the page has not these marks.
    """
    lines = table(columns, rows).splitlines()
    sys.stdout.write("\n".join(lines) + "\n")
    if options.write_docs:
        replace_between(options.docs / "quality.md", *marks, [*lines, "", source])
    if options.json:
        sys.stdout.write(json.dumps(record) + "\n")
