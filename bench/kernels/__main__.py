"""The kernels against PyTorch's own operations and the machine's limits: `python -m bench.kernels --json`."""

from collections.abc import Mapping, Sequence

import torch
from colm_kernels import native

from bench.harness.suite import Options, arguments, run
from bench.kernels.common import KernelCase, short
from bench.kernels.decode import DECODE_CASES
from bench.kernels.linear import LINEAR_CASES
from bench.kernels.prefill import PREFILL_CASES, TILE_CASES
from bench.kernels.small import SMALL_CASES
from bench.kernels.sparse import SPARSE_CASES
from bench.kernels.staircase import STAIRCASE_CASES

GROUPS: Mapping[str, Sequence[KernelCase]] = {
    "prefill": PREFILL_CASES,
    "tile": TILE_CASES,
    "sparse": SPARSE_CASES,
    "decode": DECODE_CASES,
    "linear": LINEAR_CASES,
    "staircase": STAIRCASE_CASES,
    "small": SMALL_CASES,
}


class KernelOptions(Options):
    """Options of this benchmark."""

    only: str | None


def main() -> None:
    """Run all groups of cases, or one."""
    parser = arguments("bench.kernels", __doc__)
    parser.add_argument("--only", choices=list(GROUPS), help="one group of cases")
    options = parser.parse_args(namespace=KernelOptions())
    cases = [case for group, each in GROUPS.items() if options.only in (None, group) for case in each]
    chosen = {short(dtype): native.default_variant(dtype) for dtype in (torch.bfloat16, torch.float32)}
    run(cases, options, variants=native.available_variants(), default_variants=chosen)


if __name__ == "__main__":
    main()
