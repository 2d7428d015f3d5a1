"""What keys and values in int8 cost a real model: `python -m bench.quality.kv_codec [--int8 pages] --write-docs`.

Python's language reference is prefilled once. Its keys and values go through messages into pages of their own, as
between the nodes: of either codec into pages of the model's dtype, or raw into pages of either format. A decode node's
engine reads how the text goes on over each. Cells that the record has are not run again.

Shapes: T tokens, Q tokens that are read at once, V vocabulary.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

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
from bench.quality.report import source_of
from bench.quality.text import Corpus, paragraphs
from colm.checkpoint import Checkpoint
from colm.defaults import TILE_TOKENS
from colm.dtypes import DTYPES, parse_dtype
from colm.kv import KvFormat
from colm.kv_position import KV_START
from colm.request import KV_CODECS, KvCodec
from colm.wire.tile_codec import decode_message, decode_tile
from prefill_node.encoded_tile import TileEncoder
from prefill_node.engine import PrefillEngine

_COMMAND = "bench.quality.kv_codec"
Place = Literal["stream", "pages"]
"""Where keys and values are in int8. Pages then hold the same bits after an int8 stream as after a raw one."""
MARKS: Mapping[Place, tuple[str, str]] = {
    "stream": ("<!-- bench.quality.kv_codec: table -->", "<!-- bench.quality.kv_codec: end -->"),
    "pages": ("<!-- bench.quality.kv_codec: pages -->", "<!-- bench.quality.kv_codec: end of pages -->"),
}
"""Around the table of each."""


def columns(place: Place) -> tuple[str, ...]:
    """Heads of a table."""
    plain = {"stream": "raw", "pages": "model's"}[place]
    return (
        *("text", "cache" if place == "stream" else "model", f"perplexity, {plain}", "perplexity, int8"),
        f"int8 over {plain}",
        *KL_COLUMNS,
        *(f"bytes a token, {plain}", "bytes a token, int8"),
    )


class Cell(NamedTuple):
    """One prefill."""

    num_tokens: int
    """Prompt and continuation."""
    dtype: str
    """Of weights, and of keys and values that are not in int8."""
    place: Place = "stream"

    def __str__(self) -> str:
        return f"{length(self.num_tokens)}, {self.dtype}, int8 {self.place}"

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return self._asdict()

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What int8 made of one text beside raw, which stands for the pages of the model's dtype too."""

    divergence: Divergence
    """Of int8 from raw."""
    token_bytes: dict[KvCodec, float]
    """A token's keys and values, as payload or in pages."""

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        figures = asdict(self.divergence)
        raw, int8 = figures.pop("baseline_nll_blocks"), figures.pop("nll_blocks")
        return figures | {"nll_blocks": {"raw": raw, "int8": int8}, "token_bytes": self.token_bytes}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        figures = dict(data)
        token_bytes, nll_blocks = figures.pop("token_bytes"), figures.pop("nll_blocks")
        divergence = Divergence(baseline_nll_blocks=nll_blocks["raw"], nll_blocks=nll_blocks["int8"], **figures)
        return cls(divergence=divergence, token_bytes=token_bytes)


class Experiment:
    """A model and a corpus, from which texts of any length are cut.

    Args:
        checkpoint: the model, of which chain 1 reads.
        corpus: the text.
    """

    def __init__(self, checkpoint: Checkpoint, corpus: Corpus) -> None:
        self._checkpoint = checkpoint
        self._corpus = corpus

    @property
    def setting(self) -> dict[str, Any]:
        """What all outcomes have in common."""
        return setting_of(self._checkpoint, self._corpus)

    def run(self, cell: Cell) -> Outcome:
        """Prefill the corpus's last tokens but the continuation, then read that over pages without int8 and with it.

        Raises:
            ValueError: the corpus has no such text.
        """
        prompt_N, continuation_N = prompt_and_continuation(self._corpus, cell.num_tokens)
        kv_format, num_prompt_tokens = KvFormat.of(self._checkpoint.config, parse_dtype(cell.dtype)), len(prompt_N)
        readings = {
            way: Reading(
                self._checkpoint,
                kv_format,
                num_tokens=num_prompt_tokens,
                max_text_tokens=len(continuation_N),
                cache_dtype="int8" if (way, cell.place) == ("int8", "pages") else "model",
            )
            for way in KV_CODECS
        }
        num_bytes = dict.fromkeys(KV_CODECS, 0)
        for tile in PrefillEngine(self._checkpoint, kv_format, tile_tokens=TILE_TOKENS).run(prompt_N):
            for way, reading in readings.items():
                codec = way if cell.place == "stream" else "raw"
                encoder = TileEncoder(transfer_id="t", num_tokens=num_prompt_tokens, kv_format=kv_format, codec=codec)
                for encoded in encoder.encode(tile, epoch=1, since=KV_START):
                    header, payload = decode_message(encoded.message)
                    reading.write(decode_tile(header.tile, payload, kv_format, codec))
                    num_bytes[way] += len(payload)
        raw, int8 = (readings[way].logits(continuation_N[:-1]) for way in KV_CODECS)
        return Outcome(
            divergence=compare(continuation_N, raw, int8),
            token_bytes={
                way: num_bytes[way] / num_prompt_tokens if cell.place == "stream" else reading.token_bytes
                for way, reading in readings.items()
            },
        )


def words(cell: Cell, outcome: Outcome) -> list[str]:
    """As in `columns`."""
    raw, int8 = outcome.divergence.baseline_nll_blocks, outcome.divergence.nll_blocks
    ratio = perplexity_ratio(int8, raw)
    return [
        length(cell.num_tokens),
        cell.dtype,
        *(f"{perplexity(each):.3f}" for each in (raw, int8)),
        f"{ratio.value:.4f} ± {ratio.error:.4f}",
        *kl_words(outcome.divergence),
        *(f"{outcome.token_bytes[codec]:,.0f}" for codec in KV_CODECS),
    ]


class CodecOptions(CommonOptions):
    """Of this benchmark."""

    lengths: list[int]
    dtypes: list[str]
    int8: Place


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = common_parser(_COMMAND, __doc__, record="kv_codec.jsonl")
    add = parser.add_argument
    add("--lengths", type=lengths, default="2K,4K,8K", help="of texts, within the model's context; 2K,4K,8K")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"], help="of weights, keys and values")
    add("--int8", choices=get_args(Place), default="stream", help="where keys and values are in int8; the stream")
    return parser


def run(options: CodecOptions) -> None:
    """Everything that the options ask for.

    Raises:
        ColmError: the model cannot be read, or not at such a length.
        ValueError: an option's value is impossible.
    """
    checkpoint, tokenizer = opened(options)
    check_context(options.lengths, checkpoint)
    experiment = Experiment(checkpoint, Corpus.of(paragraphs(), tokenizer.encode))
    kept = Records(options.record, experiment.setting, Cell, Outcome)
    wanted = [
        Cell(num_tokens, dtype, options.int8) for dtype in options.dtypes for num_tokens in sorted(options.lengths)
    ]
    seen = run_missing(_COMMAND, kept, wanted, experiment.run)
    of_place = [item for item in kept.outcomes.items() if item[0].place == options.int8]
    shown = sorted(of_place, key=lambda item: (item[0].dtype, item[0].num_tokens))
    dtypes = " and ".join(sorted({cell.dtype for cell, _ in shown}))
    environments = [kept.environment_of(cell) for cell, _ in shown]
    show(
        options,
        columns(options.int8),
        [words(cell, outcome) for cell, outcome in shown],
        marks=MARKS[options.int8],
        source=source_of(experiment.setting | {"dtype": dtypes}, environments),
        record={
            **seen,
            "setting": experiment.setting,
            "rows": [cell.as_json() | outcome.as_json() for cell, outcome in shown],
        },
    )


def main() -> None:
    """Run what is missing, then show everything."""
    options = parser().parse_args(namespace=CodecOptions())
    ending_well(lambda: run(options))


if __name__ == "__main__":
    main()
