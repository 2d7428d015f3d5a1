"""Time to the first token of short prompts beside a document: `python -m bench.head_of_line --model DIR --json`.

On a cluster of its own, or with `--state-dir` on one that runs. In each round, short prompts and the document are first
measured alone. Then the document runs, and short prompts come one second after it: in the closed loop each when the one
before has its first token; in the open loop at random times, so many that they take `--load` of the engine's time. What
is wanted of the closed loop (`of_bar_fraction` up to 1): short prompts, 95 in 100 of them, take at most 3 times their
time alone and a tile of the document; the document at most 1.1 times its own time alone and theirs together.

Last, prompts that are there at once, one after the other and several as one: packs of each size through the engine
alone, and then through the loop, which decides who shares steps with whom.
"""

import argparse
from pathlib import Path

from bench.harness.suite import Options, arguments, positive, run
from bench.head_of_line.case import HeadOfLineCase
from bench.head_of_line.packing import PackingCase, WaitingCase
from cluster.options import load_config
from colm.checkpoint import Checkpoint
from colm.defaults import TILE_TOKENS
from colm.dtypes import parse_dtype


class HeadOfLineOptions(Options):
    """Of this benchmark."""

    model: Path
    state_dir: Path | None
    document_tokens: int
    short_tokens: list[int]
    shorts: int
    load: float


def load(text: str) -> float:
    """An option's share of the engine's time."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def main() -> None:
    """Ask the cluster, then the engine."""
    parser = arguments("bench.head_of_line", __doc__, rounds=3)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint that the cluster serves")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="of a cluster that runs; without, one is started")
    parser.add_argument("--document-tokens", type=positive, default=6400, help="of the document; 6400")
    parser.add_argument("--short-tokens", type=positive, nargs="+", default=[64, 128, 256, 512], metavar="N")
    parser.add_argument("--shorts", type=positive, default=16, help="short prompts beside the document; 16")
    parser.add_argument("--load", type=load, default=0.5, help="of the engine by short prompts in the open loop; 0.5")
    options = parser.parse_args(namespace=HeadOfLineOptions())
    waiting = HeadOfLineCase(
        model=options.model,
        state_dir=options.state_dir,
        document_tokens=options.document_tokens,
        lengths=options.short_tokens,
        num_shorts=options.shorts,
        load=options.load,
    )
    at_once = [
        case(
            model=options.model.name,
            config=Checkpoint.open(options.model).config,
            dtype=parse_dtype(load_config(None, {"model.path": options.model}).resolved_dtype),
            tile_tokens=TILE_TOKENS,
            num_prompts=options.shorts,
            num_tokens=min(options.short_tokens),
        )
        for case in (PackingCase, WaitingCase)
    ]
    run([waiting, *at_once], options)


if __name__ == "__main__":
    main()
