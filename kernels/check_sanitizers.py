"""Prove that the sanitised library is loaded and that its sanitizers end a process: part of `make test-sanitize`.

Every variant gets one correct call, which must pass, and two faulty ones, which must end their process.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from colm_kernels import native
from colm_kernels.few_rows_linear import LinearArgs

NUM_ROWS, WIDTH = 3, 64
REPORTS = {
    "none": "",
    "write past the end": "AddressSanitizer: heap-buffer-overflow",
    "overflow of an offset": "runtime error: signed integer overflow",
}


def call(variant: native.Variant, fault: str) -> None:
    """Run one linear of 3 rows in this process, with a given fault or none."""
    x, weight = torch.ones(NUM_ROWS, WIDTH), torch.ones(WIDTH, WIDTH)
    y = torch.empty(NUM_ROWS * WIDTH - (fault == "write past the end"))
    block = (ctypes.c_int64 * 6)(weight.data_ptr(), 0, NUM_ROWS, WIDTH, WIDTH, 0)
    x_stride = 1 << 62 if fault == "overflow of an offset" else WIDTH
    args = LinearArgs(
        x.data_ptr(), y.data_ptr(), ctypes.addressof(block), 1, NUM_ROWS, WIDTH, x_stride, WIDTH,
        native.dtype_id(x.dtype),
    )  # fmt: skip
    native.call("colm_linear", args, variant, 1)


def main() -> int:
    """Each call in a process of its own; the exit status."""
    variants = [variant for variant in native.available_variants() if variant != "torch"]
    if not native.SANITIZED or not variants:
        sys.stderr.write(f"kernels: {native.LIBRARY_PATH.name} has {variants}; the sanitised library is not in use\n")
        return 1
    for variant in variants:
        for fault, report in REPORTS.items():
            command = [sys.executable, __file__, variant, fault]
            ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if (ended.returncode != 0) is not bool(report) or report not in ended.stderr:
                sys.stderr.write(f"{ended.stderr}kernels: {variant}, fault: {fault}: ended with {ended.returncode}\n")
                return 1
    sys.stdout.write(f"kernels: the sanitizers catch deliberate faults in {', '.join(variants)}\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        call(*sys.argv[1:])
    else:
        sys.exit(main())
