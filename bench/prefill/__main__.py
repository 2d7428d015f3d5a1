"""How fast chain 1 reads a prompt: `python -m bench.prefill --preset llama-3.2-1b-8-8-8-8-air --lengths 2K,8K --json`.

The prefill engine itself, with random weights. `gemm_fraction` is the rate of the products that the model needs,
divided by the rate of the best of a few matrix products, run before and after each prefill. Models and lengths take
turns. First, a short prompt's keys and values must be those of the model's definition. What has no room in memory is
skipped, and the record says why.
"""

import argparse
import sys
from dataclasses import asdict

import psutil
import torch

from bench.harness.suite import Options, arguments, positive, run
from bench.harness.units import length, parse_length
from bench.prefill.case import PrefillCase, ProfileCase
from bench.prefill.memory import choose
from colm import defaults
from colm.dtypes import dtype_name, fastest_dtype
from colm.errors import UnsupportedModel
from colm.kv import require_shared_kv
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.placement import CPU

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}


class PrefillOptions(Options):
    """Of this benchmark."""

    preset: list[tuple[str, ChainConfig]]
    lengths: list[int]
    dtype: str
    tile_tokens: int
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


def main() -> None:
    """Every model at every length."""
    parser = arguments("bench.prefill", __doc__, rounds=3)
    parser.add_argument(
        "--preset", type=model, action="append", required=True, help="a name of colm.model.presets.PRESETS; repeatable"
    )
    parser.add_argument("--lengths", type=lengths, default="2K,8K,32K", help="of prompts, powers of two; 2K,8K,32K")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype_name(fastest_dtype(CPU)), help="of weights and products"
    )
    parser.add_argument("--tile-tokens", type=positive, default=defaults.TILE_TOKENS, help="of the engine")
    parser.add_argument("--profile", action="store_true", help="each operation's share of the time, in place of rates")
    options = parser.parse_args(namespace=PrefillOptions())
    dtype = DTYPES[options.dtype]
    prefills, skipped = choose(
        dict(options.preset),
        options.lengths,
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
