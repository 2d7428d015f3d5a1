"""Is it faster than it was? `make bench` ends with it: `python -m bench.compare FRESH.json [STORED.json] [--store]`.

Both files are pytest-benchmark's. Each case's median is held against the stored one of the same machine. A case has
changed where the medians differ by more than a band that its own rounds span: twice the larger distance between
quartiles, and at least 5%. The exit status is 1 if a case is worse.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from bench.harness.suite import WIDTH_OF_A_FILE
from bench.harness.units import duration

STORED: Final = Path("bench/results/micro.json")
LEAST_BAND: Final = 0.05

Verdict = Literal["improved", "no change", "worse", "new", "gone"]
_STYLES: Final[Mapping[Verdict, str]] = {"improved": "green", "worse": "red", "new": "dim", "gone": "yellow"}


class Incomparable(Exception):
    """The files are not of one machine, or not pytest-benchmark's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One case's rounds."""

    median_s: float
    iqr_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One case, then and now."""

    name: str
    stored_s: float | None
    fresh_s: float | None
    band: float
    """Share of the stored median within which nothing has changed."""

    @property
    def ratio(self) -> float | None:
        """The fresh time over the stored one."""
        return None if self.stored_s is None or self.fresh_s is None else self.fresh_s / self.stored_s

    @property
    def verdict(self) -> Verdict:
        """What has become of it."""
        if self.ratio is None:
            return "new" if self.stored_s is None else "gone"
        if abs(self.ratio - 1) <= self.band:
            return "no change"
        return "improved" if self.ratio < 1 else "worse"


def changes(stored: Mapping[str, Timing], fresh: Mapping[str, Timing]) -> list[Change]:
    """Every case of either, in the order of the fresh ones, then those that are gone."""
    found = []
    for name in (*fresh, *(name for name in stored if name not in fresh)):
        then, now = stored.get(name), fresh.get(name)
        spans = [each.iqr_s / each.median_s for each in (then, now) if each is not None]
        found.append(
            Change(
                name=name,
                stored_s=None if then is None else then.median_s,
                fresh_s=None if now is None else now.median_s,
                band=max(LEAST_BAND, 2 * max(spans)),
            )
        )
    return found


def timings(record: Mapping[str, Any]) -> dict[str, Timing]:
    """By the names of the cases.

    Raises:
        Incomparable: it is not a record of pytest-benchmark.
    """
    try:
        stats = {each["fullname"]: each["stats"] for each in record["benchmarks"]}
        return {name: Timing(median_s=each["median"], iqr_s=each["iqr"]) for name, each in stats.items()}
    except (KeyError, TypeError) as err:
        raise Incomparable(f"no record of pytest-benchmark: {err!r} is missing") from err


def machine(record: Mapping[str, Any]) -> tuple[object, ...]:
    """What must be the same of two records: processor, its cores, and Python."""
    info = record.get("machine_info", {})
    cpu = info.get("cpu", {})
    names = ("vendor_id_raw", "brand_raw", "family", "model", "count")
    return (*(cpu.get(name) for name in names), info.get("python_version"))


def read(path: Path) -> Mapping[str, Any]:
    """A record.

    Raises:
        Incomparable: it cannot be read.
    """
    try:
        record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise Incomparable(f"{path} cannot be read: {err}") from err
    return record


def store(fresh: Mapping[str, Any], path: Path) -> None:
    """Keep a record without its single rounds, which are thousands of lines."""
    kept = {**fresh, "benchmarks": [{**each, "stats": _without_data(each["stats"])} for each in fresh["benchmarks"]]}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _without_data(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stats.items() if name != "data"}


def show(found: Sequence[Change], out: Console) -> None:
    """A table, and a line that counts."""
    table = Table(Column("", no_wrap=True), "stored", "now", "now / stored", "band", "", box=SIMPLE_HEAD)
    for each in found:
        times = [duration(seconds) if seconds is not None else "" for seconds in (each.stored_s, each.fresh_s)]
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
        style = _STYLES.get(each.verdict)
        table.add_row(each.name, *times, ratio, f"±{each.band:.0%}", each.verdict, style=style)
    out.print(table)
    counts = [f"{sum(each.verdict == kind for each in found)} {kind}" for kind in (*_STYLES, "no change")]
    out.print(", ".join(counts))


def main() -> int:
    """Compare, and keep the fresh record if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("fresh", type=Path, metavar="FRESH.json", help="of this run")
    parser.add_argument("stored", type=Path, nargs="?", default=STORED, metavar="STORED.json", help=f"{STORED}")
    parser.add_argument("--store", action="store_true", help="then let the fresh one take the stored one's place")
    parser.add_argument("--json", action="store_true", help="end with one JSON record")
    options = parser.parse_args()
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    try:
        fresh = read(options.fresh)
        now = timings(fresh)
        found: list[Change] = []
        if options.stored.exists():
            stored = read(options.stored)
            if machine(stored) == machine(fresh):
                found = changes(timings(stored), now)
                show(found, out)
            else:
                out.print(
                    f"{options.stored} is of another machine ({_named(stored)}) than this ({_named(fresh)}): "
                    "nothing is compared; --store keeps this one's"
                )
        else:
            out.print(f"{options.stored} is not there: nothing is compared; --store keeps this run as it")
        if options.store:
            store(fresh, options.stored)
    except Incomparable as err:
        out.print(f"error: {err}")
        return 2
    if options.json:
        kept = [{"name": each.name, "verdict": each.verdict, "ratio": each.ratio, "band": each.band} for each in found]
        sys.stdout.write(json.dumps({"cases": kept}) + "\n")
    return int(any(each.verdict == "worse" for each in found))


def _named(record: Mapping[str, Any]) -> str:
    return " ".join(str(each) for each in machine(record))


if __name__ == "__main__":
    sys.exit(main())
