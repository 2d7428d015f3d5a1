"""A model of other machines: `python -m bench.roofline` prints its errors and predictions.

`--calibrate` measures this machine and prints its machine file; `--fit` fits the paper's A100 again; `--write-docs`
writes docs/machines.md and docs/sizing.md. Nothing here is a measurement but `--calibrate`.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.roofline import sizing
from bench.roofline.fit import FITTED, fit
from bench.roofline.machine import machine
from bench.roofline.tables import page
from colm.dtypes import dtype_name, fastest_dtype
from colm.placement import CPU

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}
DOCS = Path(__file__).parents[2] / "docs"
PAGES = {DOCS / "machines.md": page, DOCS / "sizing.md": sizing.page}


def main() -> None:
    """Print or write one of the four."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--calibrate", action="store_true", help="measure this machine, print its machine file")
    what.add_argument("--fit", action="store_true", help="print the numbers fitted to the paper's baselines")
    what.add_argument("--write-docs", action="store_true", help="write docs/machines.md and docs/sizing.md")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype_name(fastest_dtype(CPU)), help="of a calibration")
    options = parser.parse_args()
    if options.calibrate:
        from bench.roofline.calibrate import calibrate  # brings in the nodes and gRPC

        measured = calibrate(DTYPES[options.dtype], tell=lambda what: sys.stderr.write(f"{what}\n"))
        sys.stdout.write(measured.dump())
    elif options.fit:
        fitted = fit(machine("a100-paper"))
        sys.stdout.writelines(f"{name} = {getattr(fitted, name)}\n" for name in FITTED)
    elif options.write_docs:
        for path, written in PAGES.items():
            path.write_text(written(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
