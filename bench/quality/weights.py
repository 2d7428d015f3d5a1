"""What a decode node's quantised weights cost a real model: `python -m bench.quality.weights --write-docs`.

Python's language reference is prefilled, with weights as stored, as a prefill node has them. A decode node's engine
reads how the text goes on, once with weights as stored and once quantised, and writes the keys and values of what it
reads. The model's own weights may come from blocks that quantising finds again; so it is also read with its features in
another order. Cells that the record has are not run again.

Shapes: N tokens of the prompt.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

from colm_kernels.quantised import Quantisation

from bench.harness.suite import positive
from bench.harness.units import length
from bench.quality.command import (
    CommonOptions,
    check_context,
    common_parser,
    ending_well,
    lengths,
    opened,
    run_missing,
)
from bench.quality.compared import prompt_and_continuation, setting_of, show
from bench.quality.divergence import KL_COLUMNS, Divergence, compare, kl_words
from bench.quality.metrics import perplexity, perplexity_ratio
from bench.quality.reading import Reading
from bench.quality.records import Records
from bench.quality.reordered import reorder
from bench.quality.report import source_of
from bench.quality.text import Corpus, paragraphs
from colm.checkpoint import Checkpoint
from colm.defaults import TILE_TOKENS
from colm.dtypes import DTYPES, parse_dtype
from colm.kv import KvFormat
from colm.model.weights import WeightLayout
from prefill_node.engine import PrefillEngine

_COMMAND = "bench.quality.weights"
MARKS = "<!-- bench.quality.weights: table -->", "<!-- bench.quality.weights: end -->"
COLUMNS = (
    *("text", "dtype", "model", "scale", "weights", "MB a step", "perplexity, stored", "perplexity", "over stored"),
    *KL_COLUMNS,
)
KINDS: tuple[Quantisation, ...] = get_args(Quantisation)


class Cell(NamedTuple):
    """One reading, and one with weights as stored."""

    num_tokens: int
    """Prompt and continuation."""
    dtype: str
    """Of what is not quantised, of keys and values and of the computation."""
    is_reordered: bool
    num_chains: int
    quantisation: Quantisation
    of_kv: bool
    """Whether the projections to keys and values are quantised too."""

    def __str__(self) -> str:
        words = [length(self.num_tokens), self.dtype, f"scale {self.num_chains}", self.weights]
        return ", ".join([*words, *["reordered"] * self.is_reordered])

    @property
    def weights(self) -> str:
        """As the table says it."""
        return self.quantisation + ", all" * self.of_kv

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return self._asdict()

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a cell brought."""

    divergence: Divergence
    """Of quantised weights from those as stored."""
    weight_bytes: int
    """That a step reads."""

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(divergence=Divergence(**data["divergence"]), weight_bytes=data["weight_bytes"])


class Experiment:
    """A model, the same in another order, and a corpus, from which texts of any length are cut.

    Args:
        checkpoint: the model.
        corpus: the text.
        folder: for the reordered model, which is written once it is needed.
    """

    def __init__(self, checkpoint: Checkpoint, corpus: Corpus, folder: Path) -> None:
        self._checkpoint = checkpoint
        self._corpus = corpus
        self._folder = folder

    @property
    def setting(self) -> dict[str, Any]:
        """What all outcomes have in common."""
        return setting_of(self._checkpoint, self._corpus)

    def run(self, cell: Cell) -> Outcome:
        """Prefill the corpus's last tokens but the continuation, then read that with either weights.

        Raises:
            ValueError: the corpus has no such text.
            ColmError: the weights cannot be quantised, or the model not reordered.
        """
        prompt_N, continuation_N = prompt_and_continuation(self._corpus, cell.num_tokens)
        checkpoint, dtype = self._model(cell), parse_dtype(cell.dtype)
        kv_format = KvFormat.of(checkpoint.config, dtype)

        def reading(layout: WeightLayout) -> Reading:
            return Reading(
                checkpoint,
                kv_format,
                num_tokens=len(prompt_N),
                max_text_tokens=len(continuation_N),
                num_chains=cell.num_chains,
                weights=layout,
            )

        stored = reading(WeightLayout(dtype=dtype))
        quantised = reading(
            WeightLayout(dtype=dtype, quantisation=cell.quantisation, quantise_kv_projections=cell.of_kv)
        )
        for tile in PrefillEngine(checkpoint, kv_format, tile_tokens=TILE_TOKENS).run(prompt_N):
            stored.write(tile)
            quantised.write(tile)
        read = continuation_N[:-1]
        return Outcome(
            divergence=compare(continuation_N, stored.logits(read), quantised.logits(read)),
            weight_bytes=quantised.weight_bytes,
        )

    def _model(self, cell: Cell) -> Checkpoint:
        if not cell.is_reordered:
            return self._checkpoint
        path = self._folder / self._checkpoint.path.name
        return Checkpoint.open(path) if path.exists() else reorder(self._checkpoint, path)


def words(cell: Cell, outcome: Outcome) -> list[str]:
    """As in `COLUMNS`."""
    found = outcome.divergence
    ratio = perplexity_ratio(found.nll_blocks, found.baseline_nll_blocks)
    return [
        length(cell.num_tokens),
        cell.dtype,
        "reordered" if cell.is_reordered else "as imported",
        str(cell.num_chains),
        cell.weights,
        f"{outcome.weight_bytes / 1e6:.0f}",
        *(f"{perplexity(each):.3f}" for each in (found.baseline_nll_blocks, found.nll_blocks)),
        f"{ratio.value:.4f} ± {ratio.error:.4f}",
        *kl_words(found),
    ]


class WeightsOptions(CommonOptions):
    """Of this benchmark."""

    lengths: list[int]
    dtypes: list[str]
    scales: list[int] | None


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = common_parser(_COMMAND, __doc__, record="weights.jsonl", model="SmolLM2-135M-Instruct-9-3")
    add = parser.add_argument
    add("--lengths", type=lengths, default="2K", help="of texts, within the model's context; 2K")
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["bfloat16", "float32"],
        help="of keys, values and the computation",
    )
    add("--scales", nargs="+", type=positive, metavar="N", help="chains; all")
    return parser


def run(options: WeightsOptions) -> None:
    """Everything that the options ask for.

    Raises:
        ColmError: the model cannot be read, or not at such a length.
        ValueError: an option's value is impossible.
    """
    checkpoint, tokenizer = opened(options)
    check_context(options.lengths, checkpoint)
    wanted = [
        Cell(num_tokens, dtype, is_reordered, num_chains, quantisation, of_kv)
        for num_tokens in sorted(options.lengths)
        for dtype in options.dtypes
        for is_reordered in (False, True)
        for num_chains in options.scales or range(1, checkpoint.config.num_chains + 1)
        for quantisation in KINDS
        for of_kv in (False, True)
    ]
    with tempfile.TemporaryDirectory(prefix="colm-weights-") as folder:
        experiment = Experiment(checkpoint, Corpus.of(paragraphs(), tokenizer.encode), Path(folder))
        kept = Records(options.record, experiment.setting, Cell, Outcome)
        seen = run_missing(_COMMAND, kept, wanted, experiment.run)
    shown = sorted(kept.outcomes.items())
    dtypes, scales = ({cell.dtype for cell, _ in shown}, {str(cell.num_chains) for cell, _ in shown})
    setting = experiment.setting | {"dtype": " and ".join(sorted(dtypes))}
    show(
        options,
        COLUMNS,
        [words(cell, outcome) for cell, outcome in shown],
        marks=MARKS,
        source=source_of(setting, kept.environments, "scales " + " and ".join(sorted(scales))),
        record={
            **seen,
            "setting": experiment.setting,
            "rows": [cell.as_json() | outcome.as_json() for cell, outcome in shown],
        },
    )


def main() -> None:
    """Run what is missing, then show everything."""
    options = parser().parse_args(namespace=WeightsOptions())
    ending_well(lambda: run(options))


if __name__ == "__main__":
    main()
