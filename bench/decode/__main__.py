"""How fast a decode step is beside plain reading: `python -m bench.decode --json --output bench/results/decode.json`.

One token a step of each of some answers, all layers in one call of the kernels' library, as a decode node runs them.
`gb_per_s` counts what a step reads once: the weights, and the answers' keys and values. `read` is a sum over memory in
the same rounds, which bounds a step; a bar says how near to it a step of one answer should be.

    steps      scales 1 and 2 of a checkpoint, 512 to 64K tokens, 1, 4 and 16 answers: weights as stored, in int8 and
               in q4, and pages of int8
    large      a 1B in four chains with random weights, at chain 1 and all chains
    batches    tokens a second of 1, 4 and 16 answers of 256 tokens
    attention  decode attention by itself, 1 and 8 answers, over pages of either format
    peers      llama.cpp's own Q4_1 file beside it, where it is installed; else the record says why it is not there

All of it takes about five minutes, `--quick` less than one. With a MODEL, only that one: every scale at `--context` and
`--answers`, also with the model's modules one by one, which must give the same logits; `--weights` adds quantised
ones, and `--profile` shows where the time goes.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, get_args

from colm_kernels import native
from colm_kernels.quantised import Quantisation

from bench.decode.attention import attention_cases
from bench.decode.batch import BatchCase
from bench.decode.loaded import Models, Source, Way
from bench.decode.peer import PeerCase, why_absent
from bench.decode.step import DecodeCase
from bench.harness.contest import Case
from bench.harness.suite import Options, arguments, num_tokens, positive, run
from colm.checkpoint import Checkpoint

MODEL: Final = Source("models/SmolLM2-135M-Instruct-9-3")
GGUF: Final = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")
LARGE: Final = Source("llama-3.2-1b-8-8-8-8-air", is_preset=True)
ALL_WAYS: Final[tuple[Way, ...]] = ("one_call", "int8", "q4", "int8_pages")
GROUPS: Final = ("steps", "large", "batches", "attention", "peers")
STEPS: Final = ((512, 1), (512, 4), (512, 16), (6400, 1), (6400, 4), (6400, 16), (65536, 1))
LARGE_STEPS: Final = ((512, 1), (512, 4), (512, 16), (6400, 1), (65536, 1))
"""Tokens of context, and answers."""
QUICK_ROUNDS: Final = 3


class DecodeOptions(Options):
    """Of this benchmark."""

    model: Path | None
    context: int
    answers: int
    weights: list[Quantisation]
    profile: bool
    only: list[str]
    quick: bool


def suite(only: Sequence[str], *, quick: bool) -> Iterator[Case]:
    """The cases of some groups; the quick ones are those of one answer of 512 tokens, and of 256 in a batch."""
    models = Models()

    def steps(source: Source, scales: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
        for context_len, num_answers in shapes[:1] if quick else shapes:
            for scale in scales:
                yield DecodeCase(
                    source=source,
                    num_chains=scale,
                    context_len=context_len,
                    num_answers=num_answers,
                    ways=ALL_WAYS,
                    models=models,
                )

    if "steps" in only:
        yield from steps(MODEL, (1, 2), STEPS)
    if "batches" in only:
        yield from (BatchCase(source=MODEL, num_chains=scale, models=models) for scale in (1, 2))
    if "peers" in only:
        contexts = (512,) if quick else (512, 6400)
        yield from (PeerCase(source=MODEL, gguf=GGUF, context_len=each, models=models) for each in contexts)
    if "large" in only and not quick:
        yield from steps(LARGE, (1, LARGE.config.num_chains), LARGE_STEPS)
    if "attention" in only:
        yield from attention_cases()[: 1 if quick else None]


def scales_of(options: DecodeOptions, model: Path) -> Iterator[Case]:
    """Every scale of one model, in both ways."""
    models = Models()
    for scale in range(1, Checkpoint.open(model).config.num_chains + 1):
        yield DecodeCase(
            source=Source(str(model)),
            num_chains=scale,
            context_len=options.context,
            num_answers=options.answers,
            ways=("one_call", "modules", *options.weights),
            profile=options.profile,
            models=models,
        )


def main() -> None:
    """The suite, or one model."""
    parser = arguments("bench.decode", __doc__, rounds=10)
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint's directory: only this one")
    parser.add_argument("--context", type=num_tokens, default=16, help="tokens in the cache, the step's included; 16")
    parser.add_argument("--answers", type=positive, default=1, help="of one token each in a step; 1")
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=get_args(Quantisation),
        default=[],
        help="quantised, beside the stored ones",
    )
    parser.add_argument("--profile", action="store_true", help="add the time of each part")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of the suite; all")
    parser.add_argument(
        "--quick", action="store_true", help="one answer of 512 tokens, no large model, at most 3 rounds"
    )
    options = parser.parse_args(namespace=DecodeOptions())
    if options.quick:
        options.rounds = min(options.rounds, QUICK_ROUNDS)
    absent: dict[str, str] = {}
    if options.model is not None:
        cases = list(scales_of(options, options.model))
    else:
        if "peers" in options.only and (reason := why_absent(GGUF)) is not None:
            absent["llama.cpp"] = reason
            sys.stderr.write(f"llama.cpp is absent: {reason}\n")
        cases = list(suite([group for group in options.only if group != "peers" or not absent], quick=options.quick))
    run(cases, options, variants=native.available_variants(), absent=absent)


if __name__ == "__main__":
    main()
