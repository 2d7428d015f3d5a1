"""Each cell's speed-up over its baseline: the paper's, ours, and what the operations alone would allow."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from bench import paper
from bench.harness import records
from bench.paper import PaperCell
from bench.prefill.record import CellRecord
from colm.flops import prefill_flops
from colm.model.presets import preset

OF_THE_FLOPS: Final = 0.97
"""Where the paper's speed-up is beyond what the operations allow, this share of that is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A dense cell of the tables beside ours."""

    cell: PaperCell
    ours: CellRecord | None
    """None where nothing was run."""
    paper_speedup: float | None
    """None where the paper has the cell wrong."""
    flops_ratio: float
    """The baseline's operations over this preset's."""

    @property
    def over_paper(self) -> float | None:
        """Our speed-up over the paper's; None where one is missing or ours was modelled."""
        if self.ours is None or self.ours.measured == "modelled" or self.paper_speedup is None:
            return None
        return self.ours.over_baseline.value / self.paper_speedup

    @property
    def bar(self) -> float:
        """The smaller of the paper's speed-up and most of the ratio of operations."""
        allowed = OF_THE_FLOPS * self.flops_ratio
        return allowed if self.paper_speedup is None else min(self.paper_speedup, allowed)

    @property
    def is_met(self) -> bool | None:
        """Whether ours reaches the bar; None where ours was not measured, and of a baseline."""
        if self.ours is None or self.ours.measured == "modelled" or self.cell.kind == "baseline":
            return None
        return self.ours.over_baseline.value >= self.bar


@cache
def _flops(name: str, num_tokens: int) -> int:
    return prefill_flops(preset(name), num_tokens)


def newest(found: Iterable[CellRecord]) -> list[CellRecord]:
    """Of the conditions of the last record, the last record of each cell, one that was measured before a modelled one.

    Records of other commits, machines or settings are not mixed in.
    """
    listed = list(found)
    chosen: dict[tuple[str, str, int], CellRecord] = {}
    for record in listed:
        before = chosen.get(record.key)
        if record.conditions != listed[-1].conditions:
            continue
        if before is None or record.measured != "modelled" or before.measured == "modelled":
            chosen[record.key] = record
    return list(chosen.values())


def load(path: Path) -> list[CellRecord]:
    """The newest records of a file.

    Raises:
        ValueError: there are none, or one is not a record.
    """
    found = newest(CellRecord.model_validate(each) for each in records.read(path))
    if not found:
        raise ValueError(f"{path} holds no records; `python -m bench.prefill --budget-minutes 180` makes them")
    return found


def compare(found: Sequence[CellRecord]) -> list[Comparison]:
    """Every dense cell of the tables, in their order."""
    ours = {record.key: record for record in found}
    tables = paper.load()
    return [
        Comparison(
            cell=cell,
            ours=ours.get(key),
            paper_speedup=tables.speedup(*key),
            flops_ratio=_flops(cell.baseline, cell.num_tokens) / _flops(cell.preset, cell.num_tokens),
        )
        for key, cell in tables.cells.items()
        if cell.attention == "dense"
    ]
