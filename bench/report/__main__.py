"""The paper's prefill tables beside ours: `python -m bench.report` prints the comparison and writes docs/prefill.md.

Plots go to docs/plots/ where matplotlib is installed (the extra `bench`). `--check` writes nothing and fails if a
figure in README or docs names no record; `bench/report/figures.py` says how a figure names one.
"""

import argparse
import sys
from pathlib import Path

from bench.report import plots
from bench.report.compare import compare, load
from bench.report.figures import problems
from bench.report.page import page

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Write the page, or check all pages."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a figure of README or docs names no record")
    parser.add_argument("--records", type=Path, default=ROOT / "bench/results/prefill.jsonl", help="of bench.prefill")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page and of plots/")
    options = parser.parse_args()
    if options.check:
        found = problems(ROOT)
        sys.stdout.writelines(f"{each}\n" for each in found)
        sys.exit(1 if found else 0)
    try:
        loaded = load(options.records)
    except ValueError as err:
        parser.error(str(err))
    compared = compare(loaded)
    try:
        drawn = plots.write(compared, loaded, options.docs / "plots")
    except ImportError as err:
        sys.stderr.write(f"{err}\n")
        drawn = []
    text = page(compared, loaded, f"../bench/results/{options.records.name}", [f"plots/{path.name}" for path in drawn])
    (options.docs / "prefill.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
