"""How fast chain 1 reads a prompt: the paper's prefill tables on this machine, or the presets that are named.

`python -m bench.prefill --budget-minutes 25` runs every row of the tables, dense and sparse, 2K to 1M, beside its
baseline: whole, on a sample of one layer's tiles, or by a model of this machine, as the budget allows; short lengths
come first. Each record says which, and how far a sample is off the whole where both ran. Sparse rows give a row of
queries `--keys-per-row` keys. Peers run the baseline's shape in the same turns, 512 to 8K. Records are lines that are
added to `--output`, group by group: interrupt it at any time; what the file holds already is not run again.
`python -m bench.report` compares them with the paper's.

`python -m bench.prefill --preset llama-3.2-1b-8-8-8-8-air --lengths 2K,8K --json` times whole prefills in rounds.
`gemm_fraction` is the rate of the products that the model needs, divided by the rate of the best of a few matrix
products, run before and after each prefill. Models and lengths take turns. What has no room in memory is skipped, and
the record says why.

Both run the prefill engine itself, with random weights, once a short prompt's keys and values are those of the model's
definition.
"""

import argparse
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from bench import paper, peers
from bench.harness.environment import environment
from bench.harness.suite import Options, arguments, positive, run
from bench.harness.units import length, parse_length
from bench.prefill.case import PrefillCase, ProfileCase
from bench.prefill.cost import Costs
from bench.prefill.memory import choose
from bench.prefill.plan import groups
from bench.prefill.sparse import KEYS_PER_ROW, Budget
from bench.prefill.suite import Suite
from bench.prefill.timer import EngineTimer
from bench.roofline.calibrate import calibrate
from cluster.interrupts import Interrupts
from colm import defaults
from colm.dtypes import dtype_name, fastest_dtype
from colm.errors import UnsupportedModel
from colm.kv import require_shared_kv
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.placement import CPU

RECORDS = Path("bench/results/prefill.jsonl")
ROUNDS_LENGTHS = [2 << 10, 8 << 10, 32 << 10]
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}


class PrefillOptions(Options):
    """Of this benchmark."""

    preset: list[tuple[str, ChainConfig]] | None
    lengths: list[int] | None
    budget_minutes: float | None
    dtype: str
    tile_tokens: int
    keys_per_row: int
    peers: list[str]
    profile: bool


def lengths(text: str) -> list[int]:
    """An option's lengths, e.g. `2K,8K`."""
    try:
        return [parse_length(each) for each in text.split(",")]
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def model(name: str) -> tuple[str, ChainConfig]:
    """An option's model, by a name of `colm.model.presets`, that a prefill node can serve."""
    try:
        config = preset(name)
        require_shared_kv(config)
    except (ValueError, UnsupportedModel) as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    return name, config


def minutes(text: str) -> float:
    """An option's time, above zero."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main() -> None:
    """The paper's tables within a budget, or the named presets in rounds."""
    parser = arguments("bench.prefill", __doc__, rounds=3)
    parser.add_argument(
        "--preset",
        type=model,
        action="append",
        help="a name of colm.model.presets.PRESETS; repeatable; with a budget, every row of the paper's tables",
    )
    parser.add_argument(
        "--lengths",
        type=lengths,
        help="of prompts, e.g. 2K,1M; 2K,8K,32K or, with a budget, those of the paper's tables",
    )
    parser.add_argument(
        "--budget-minutes", type=minutes, help="run the paper's tables, as much of them as so many minutes allow"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype_name(fastest_dtype(CPU)), help="of weights and products"
    )
    parser.add_argument("--tile-tokens", type=positive, default=defaults.TILE_TOKENS, help="of the engine")
    parser.add_argument(
        "--keys-per-row",
        type=positive,
        default=KEYS_PER_ROW,
        help=f"that sparse rows of the tables give a row of queries at most; {KEYS_PER_ROW}",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=tuple(peers.PEERS),
        default=list(peers.PEERS),
        help=f"run the shape of {peers.BASELINE} at 512 to 8K beside it, with a budget; all; one that is not installed "
        "is absent",
    )
    parser.add_argument("--profile", action="store_true", help="each operation's share of the time, in place of rates")
    options = parser.parse_args(namespace=PrefillOptions())
    if options.budget_minutes is not None:
        _suite(parser, options, options.budget_minutes)
    elif options.preset is None:
        parser.error("one of --budget-minutes and --preset is required")
    else:
        _rounds(options, dict(options.preset))


def _suite(parser: argparse.ArgumentParser, options: PrefillOptions, budget_minutes: float) -> None:
    if options.profile:
        parser.error("--profile goes with --preset alone, without --budget-minutes")
    tables = paper.load()
    installed = [name for name in options.peers if peers.is_installed(name)]
    try:
        budget = Budget(options.keys_per_row)
        todo = groups(
            [name for name, _ in options.preset] if options.preset else list(tables.rows),
            options.lengths or sorted({cell.num_tokens for cell in tables.cells.values()}),
            peers=options.peers,
            peers_baseline=peers.BASELINE,
            peer_lengths=peers.LENGTHS
            if options.lengths is None
            else [each for each in peers.LENGTHS if each in options.lengths],
        )
    except ValueError as err:
        parser.error(str(err))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    dtype, path = DTYPES[options.dtype], options.output or RECORDS
    suite = Suite(
        groups=todo,
        costs=Costs(
            machine=calibrate(dtype, seed=options.seed, with_stream=False),
            dtype=dtype,
            tile_tokens=options.tile_tokens,
            num_rounds=options.rounds,
            available_bytes=psutil.virtual_memory().available,
            budget=budget,
            peers=installed,
        ),
        budget_s=60 * budget_minutes,
        path=path,
        environment={
            "command": shlex.join(["python", "-m", options.module, *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "seed": options.seed,
            **environment(),
        },
    )
    timer = EngineTimer(dtype=dtype, tile_tokens=options.tile_tokens, seed=options.seed, budget=budget)
    try:
        with Interrupts():
            suite.run(timer)
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted; {path} has every group that was done; the same command goes on after them\n")
        sys.exit(130)
    finally:
        timer.close()


def _rounds(options: PrefillOptions, models: dict[str, ChainConfig]) -> None:
    dtype = DTYPES[options.dtype]
    prefills, skipped = choose(
        models,
        options.lengths or ROUNDS_LENGTHS,
        dtype=dtype,
        tile_tokens=options.tile_tokens,
        available_bytes=psutil.virtual_memory().available,
    )
    for each in skipped:
        sys.stderr.write(f"skipping {each.model} at {length(each.num_tokens)}: {each.reason}\n")
    case = ProfileCase if options.profile else PrefillCase
    cases = [case(prefills=prefills, dtype=dtype, tile_tokens=options.tile_tokens)] if prefills else []
    run(cases, options, skipped=[asdict(each) for each in skipped])


if __name__ == "__main__":
    main()
