"""What the int8 codec of the KV stream costs a real model: `python -m bench.quality.kv_codec --write-docs`.

Python's language reference is prefilled once. Its keys and values go through messages of either codec into pages of
their own, as between the nodes, and a decode node's engine reads how the text goes on over each. Cells that the record
has are not run again.

Shapes: T tokens, Q tokens that are read at once, V vocabulary.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, NamedTuple

import torch
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from torch import Tensor

from bench.harness import records
from bench.harness.environment import environment
from bench.harness.markdown import replace_between, table
from bench.harness.suite import positive
from bench.harness.units import length
from bench.quality.__main__ import ROOT, lengths
from bench.quality.cells import NUM_CONTINUED
from bench.quality.experiment import NUM_BLOCKS, NUM_SCORED
from bench.quality.metrics import block_means, negative_log_likelihoods, perplexity, perplexity_ratio
from bench.quality.reading import Reading
from bench.quality.report import source_of
from bench.quality.text import Corpus, paragraphs
from cluster.cli.output import note
from colm.checkpoint import Checkpoint, backbone_digest
from colm.defaults import TILE_TOKENS
from colm.dtypes import DTYPES, parse_dtype
from colm.errors import ColmError, ConfigError
from colm.kv import KvFormat
from colm.kv_position import KV_START
from colm.request import KV_CODECS, KvCodec
from colm.text.tokenizer import Tokenizer
from colm.wire.tile_codec import decode_message, decode_tile
from prefill_node.encoded_tile import TileEncoder
from prefill_node.engine import PrefillEngine

BEGIN, END = "<!-- bench.quality.kv_codec: table -->", "<!-- bench.quality.kv_codec: end -->"
COLUMNS = (
    *("text", "cache", "perplexity, raw", "perplexity, int8", "int8 over raw"),
    *("KL, mean", "KL, 99th percentile", "KL, largest", "same likeliest token"),
    *("bytes a token, raw", "bytes a token, int8"),
)


class Cell(NamedTuple):
    """One prefill."""

    num_tokens: int
    """Prompt and continuation."""
    dtype: str
    """Of weights, keys and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What either codec made of one text."""

    nll_blocks: dict[KvCodec, list[float]]
    """Mean -ln p over blocks of the scored tokens, in order."""
    kl_mean: float
    """Of the next token's distribution with int8 from that with raw, at each scored token; nats."""
    kl_p99: float
    kl_max: float
    same_top_share: float
    """Of the scored tokens, those where both find the same next token likeliest."""
    token_bytes: dict[KvCodec, float]
    """Payload of a token's keys and values."""


def divergences(raw_QV: Tensor, int8_QV: Tensor) -> Tensor:
    """KL(raw || int8) of each row of logits in nats, float64 [Q]."""
    raw_QV, int8_QV = (each.double().log_softmax(dim=1) for each in (raw_QV, int8_QV))
    return (raw_QV.exp() * (raw_QV - int8_QV)).sum(dim=1)


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
        return {
            "model": self._checkpoint.path.name,
            "backbone_sha256": backbone_digest(self._checkpoint),
            "text_sha256": self._corpus.sha256,
            "num_scored": NUM_SCORED,
        }

    def run(self, cell: Cell) -> Outcome:
        """Prefill the corpus's last tokens but the continuation, then read that over each codec's pages.

        Raises:
            ValueError: the corpus has no such text.
        """
        if not NUM_CONTINUED < cell.num_tokens <= len(self._corpus.token_ids_N):
            raise ValueError(f"num_tokens={cell.num_tokens} must be above {NUM_CONTINUED} and within the corpus")
        text_N = self._corpus.token_ids_N[-cell.num_tokens :]
        prompt_N, continuation_N = text_N[:-NUM_CONTINUED], text_N[-NUM_CONTINUED:]
        kv_format, num_prompt_tokens = KvFormat.of(self._checkpoint.config, parse_dtype(cell.dtype)), len(prompt_N)
        readings = {
            codec: Reading(
                self._checkpoint, kv_format, num_tokens=num_prompt_tokens, max_text_tokens=len(continuation_N)
            )
            for codec in KV_CODECS
        }
        num_bytes = dict.fromkeys(KV_CODECS, 0)
        for tile in PrefillEngine(self._checkpoint, kv_format, tile_tokens=TILE_TOKENS).run(prompt_N):
            for codec, reading in readings.items():
                encoder = TileEncoder(transfer_id="t", num_tokens=num_prompt_tokens, kv_format=kv_format, codec=codec)
                for encoded in encoder.encode(tile, epoch=1, since=KV_START):
                    header, payload = decode_message(encoded.message)
                    reading.write(decode_tile(header.tile, payload, kv_format, codec))
                    num_bytes[codec] += len(payload)
        read = continuation_N[:-1]
        following = torch.from_numpy(continuation_N[1:]).split(MAX_QUERY_TOKENS)
        nlls: dict[KvCodec, list[float]] = {codec: [] for codec in KV_CODECS}
        kls: list[float] = []
        is_same: list[bool] = []
        for raw_QV, int8_QV, next_Q in zip(
            *(readings[each].logits(read) for each in KV_CODECS), following, strict=True
        ):
            for codec, logits_QV in (("raw", raw_QV), ("int8", int8_QV)):
                nlls[codec] += negative_log_likelihoods(logits_QV, next_Q).tolist()
            kls += divergences(raw_QV, int8_QV).tolist()
            is_same += (raw_QV.argmax(dim=1) == int8_QV.argmax(dim=1)).tolist()
        scored = kls[-NUM_SCORED:]
        return Outcome(
            nll_blocks={
                codec: [round(each, 6) for each in block_means(nlls[codec][-NUM_SCORED:], NUM_BLOCKS)]
                for codec in KV_CODECS
            },
            kl_mean=mean(scored),
            kl_p99=quantiles(scored, n=100)[-1],
            kl_max=max(scored),
            same_top_share=mean(is_same[-NUM_SCORED:]),
            token_bytes={codec: num_bytes[codec] / num_prompt_tokens for codec in KV_CODECS},
        )


def words(cell: Cell, outcome: Outcome) -> list[str]:
    """As in `COLUMNS`."""
    raw, int8 = (outcome.nll_blocks[codec] for codec in KV_CODECS)
    ratio = perplexity_ratio(int8, raw)
    return [
        length(cell.num_tokens),
        cell.dtype,
        *(f"{perplexity(each):.3f}" for each in (raw, int8)),
        f"{ratio.value:.4f} ± {ratio.error:.4f}",
        *(f"{each:.5f}" for each in (outcome.kl_mean, outcome.kl_p99, outcome.kl_max)),
        f"{outcome.same_top_share:.1%}",
        *(f"{outcome.token_bytes[codec]:,.0f}" for codec in KV_CODECS),
    ]


class CodecOptions(argparse.Namespace):
    """Of this benchmark."""

    model: Path
    lengths: list[int]
    dtypes: list[str]
    threads: int | None
    record: Path
    docs: Path
    json: bool
    write_docs: bool


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality.kv_codec", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), metavar="DIR", help="a checkpoint")
    add("--lengths", type=lengths, default="2K,4K,8K", help="of texts, within the model's context; 2K,4K,8K")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"], help="of weights, keys and values")
    add("--threads", type=positive, help="of PyTorch and of the kernels; PyTorch's own setting")
    add("--record", type=Path, default=ROOT / "bench/results/kv_codec.jsonl", metavar="FILE", help="a line a cell")
    add("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="the folder of quality.md")
    add("--json", action="store_true", help="end with one JSON object")
    add("--write-docs", action="store_true", help="write the table into the docs")
    return parser


def run(options: CodecOptions) -> None:
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
    if (longest := max(options.lengths)) > checkpoint.config.max_context:
        context = length(checkpoint.config.max_context)
        raise ConfigError(f"--lengths: {length(longest)} is beyond the model's context, {context}")
    experiment = Experiment(checkpoint, Corpus.of(paragraphs(), tokenizer.encode))
    found = of_setting(options.record, experiment.setting)
    seen = environment() | {"command": shlex.join(["python", "-m", "bench.quality.kv_codec", *sys.argv[1:]])}
    wanted = [Cell(num_tokens, dtype) for dtype in options.dtypes for num_tokens in sorted(options.lengths)]
    missing = [cell for cell in wanted if cell not in found]
    for number, cell in enumerate(missing, start=1):
        note(f"{number}/{len(missing)} {length(cell.num_tokens)}, {cell.dtype}")
        outcome = experiment.run(cell)
        record = {"cell": cell._asdict(), "outcome": asdict(outcome), "setting": experiment.setting}
        records.append(options.record, [record | {"environment": seen}])
        found[cell] = outcome, seen
    shown = sorted(found.items(), key=lambda item: (item[0].dtype, item[0].num_tokens))
    lines = table(COLUMNS, [words(cell, outcome) for cell, (outcome, _) in shown]).splitlines()
    sys.stdout.write("\n".join(lines) + "\n")
    if options.write_docs:
        dtypes = " and ".join(sorted({cell.dtype for cell in found}))
        source = source_of(experiment.setting | {"dtype": dtypes}, [each for _, (_, each) in shown])
        replace_between(options.docs / "quality.md", BEGIN, END, [*lines, "", source])
    if options.json:
        rows = [cell._asdict() | asdict(outcome) for cell, (outcome, _) in shown]
        sys.stdout.write(json.dumps(seen | {"setting": experiment.setting, "rows": rows}) + "\n")


def of_setting(path: Path, setting: dict[str, Any]) -> dict[Cell, tuple[Outcome, dict[str, Any]]]:
    """The record's outcomes of a setting, and in which environment each was made."""
    mine = [record for record in records.read(path) if record["setting"] == setting]
    return {Cell(**each["cell"]): (Outcome(**each["outcome"]), each["environment"]) for each in mine}


def main() -> None:
    """Run what is missing, then show everything."""
    options = parser().parse_args(namespace=CodecOptions())
    try:
        run(options)
    except (ColmError, ValueError) as err:
        note(f"error: {err}")
        raise SystemExit(1) from err


if __name__ == "__main__":
    main()
