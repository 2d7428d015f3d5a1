"""`make fuzz`: damaged files, templates, tokenizers and messages. Each must end well or in a typed error."""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from tests.fuzz.child import CPU_S, KINDS, MAX_BYTES
from tests.fuzz.runner import Counts, run


def main() -> int:
    """Run, print a table, and exit with 1 if a case ended in anything else."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one (default 0)")
    parser.add_argument("--seconds", type=float, help="stop after this time, whatever is left")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {','.join(KINDS)} (default all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := sorted(set(kinds) - KINDS.keys()):
        parser.error(f"--kinds={','.join(unknown)} is unknown; choose of {','.join(KINDS)}")
    console = Console(stderr=True)
    with console.status("") as status:

        def show(counts: Counts) -> None:
            status.update(f"{sum(counts.tried.values())} of {options.cases} cases, {counts.num_other} neither")

        counts = run(
            kinds,
            seed=options.seed,
            first=options.first,
            num_cases=options.cases,
            seconds=options.seconds,
            progress=show,
        )
    console.print(_table(counts))
    for findings in counts.other.values():
        for finding in findings[:20]:
            console.print(finding, markup=False, highlight=False)
    if options.json:
        print(json.dumps(_record(options, counts)))  # noqa: T201
    return 1 if counts.num_other else 0


def _table(counts: Counts) -> Table:
    table = Table(
        "kind",
        "tried",
        "typed error",
        "ok",
        "other",
        "most CPU s",
        title=f"{MAX_BYTES >> 20} MiB and {CPU_S:g} s a case",
    )
    for kind in sorted(counts.tried):
        other = len(counts.other.get(kind, []))
        most = f"{counts.most_cpu_s[kind]:.2f}"
        table.add_row(kind, *map(str, (counts.tried[kind], counts.typed[kind], counts.ok[kind], other, most)))
    sums = (counts.tried.total(), counts.typed.total(), counts.ok.total(), counts.num_other)
    table.add_row("all", *map(str, sums))
    return table


def _record(options: argparse.Namespace, counts: Counts) -> dict[str, object]:
    return {
        "seed": options.seed,
        "tried": counts.tried.total(),
        "typed": counts.typed.total(),
        "ok": counts.ok.total(),
        "other": counts.num_other,
    }


if __name__ == "__main__":
    sys.exit(main())
