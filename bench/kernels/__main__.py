"""The kernels against PyTorch's own and against what the machine can do: `python -m bench.kernels --json`.

Every case is first held against the definition. Then the contenders of the case run in turn, round after round, so
that a ratio never compares two moments of a busy machine.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from colm_kernels import native

from bench import record
from bench.kernels.common import SEED, Case, short
from bench.kernels.decode import DECODE_CASES
from bench.kernels.linear import LINEAR_CASES
from bench.kernels.prefill import PREFILL_CASES, TILE_CASES
from bench.kernels.small import SMALL_CASES
from bench.kernels.sparse import SPARSE_CASES
from bench.kernels.staircase import STAIRCASE_CASES

GROUPS: Mapping[str, Sequence[Case]] = {
    "prefill": PREFILL_CASES,
    "tile": TILE_CASES,
    "sparse": SPARSE_CASES,
    "decode": DECODE_CASES,
    "linear": LINEAR_CASES,
    "staircase": STAIRCASE_CASES,
    "small": SMALL_CASES,
}


def environment(command: str) -> dict[str, Any]:
    """What a record begins with, and which variants of the kernels this machine takes."""
    chosen = {short(dtype): native.default_variant(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return record.environment(command, SEED) | {"variants": native.available_variants(), "default_variants": chosen}


def _row(name: str, metrics: Mapping[str, Any]) -> str:
    cells = [
        f"{key}={value['median']:g} [{value['min']:g}..{value['max']:g}]"
        if isinstance(value, dict)
        else f"{key}={value:g}"
        for key, value in metrics.items()
    ]
    return f"{name}\n    " + "\n    ".join(cells)


def _plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: short(value) if isinstance(value, torch.dtype) else value for name, value in fields}


def main() -> None:
    """Run the cases; the last line of stdout is the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON record")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each case")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and of the kernels; its own setting")
    parser.add_argument("--only", choices=list(GROUPS), help="one group of cases")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    result = environment(" ".join(["python", "-m", "bench.kernels", *sys.argv[1:]])) | {"cases": []}
    for group in GROUPS if options.only is None else (options.only,):
        for case in GROUPS[group]:
            metrics = case.measure(options.rounds)
            shape = asdict(case, dict_factory=_plain)
            result["cases"].append({"name": case.name, "shape": shape, "metrics": metrics})
            sys.stdout.write(_row(case.name, metrics) + "\n")
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
