"""Each cell's speed-up over its dense baseline: the paper's, ours, and what the operations alone would allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from bench import paper
from bench.paper import PaperCell
from bench.prefill.record import CellRecord, PeerRecord, cells, peers, read
from colm.flops import prefill_flops
from colm.model.presets import preset

OF_THE_FLOPS: Final = 0.97
"""Where the paper's speed-up is beyond what the operations allow, this share of that is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A cell of the tables beside ours."""

    cell: PaperCell
    ours: CellRecord | None
    """None where nothing was run."""
    paper_speedup: float | None
    """None where the paper has the cell wrong."""
    flops_ratio: float | None
    """The baseline's operations over this preset's; None where attention is sparse."""

    @property
    def over_paper(self) -> float | None:
        """Our speed-up over the paper's; None where one is missing or ours was modelled."""
        if self.ours is None or self.ours.measured == "modelled" or self.paper_speedup is None:
            return None
        return self.ours.over_baseline.value / self.paper_speedup

    @property
    def bar(self) -> float | None:
        """The smaller of the paper's speed-up and most of the ratio of operations; of a sparse cell the paper's."""
        if self.flops_ratio is None:
            return self.paper_speedup
        allowed = OF_THE_FLOPS * self.flops_ratio
        return allowed if self.paper_speedup is None else min(self.paper_speedup, allowed)

    @property
    def is_met(self) -> bool | None:
        """Whether ours reaches the bar; None where ours was not measured, without a bar, and of a dense baseline."""
        is_baseline = self.cell.kind == "baseline" and self.cell.attention == "dense"
        if self.ours is None or self.ours.measured == "modelled" or self.bar is None or is_baseline:
            return None
        return self.ours.over_baseline.value >= self.bar


@cache
def _flops(name: str, num_tokens: int) -> int:
    return prefill_flops(preset(name), num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The newest records of one commit, machine and setting."""

    cells: Sequence[CellRecord]
    peers: Sequence[PeerRecord]

    @property
    def last(self) -> CellRecord:
        """Of the cells."""
        return self.cells[-1]


def newest(found: Sequence[CellRecord | PeerRecord]) -> Found:
    """Of the conditions of the last record, the last record of each cell, one that was measured before a modelled one.

    Records of other commits, machines or settings are not mixed in.
    """
    same = [record for record in found if record.conditions == found[-1].conditions]
    chosen: dict[tuple[str, str, int], CellRecord] = {}
    for record in cells(same):
        before = chosen.get(record.key)
        if before is None or record.measured != "modelled" or before.measured == "modelled":
            chosen[record.key] = record
    of_peers = {record.key: record for record in peers(same)}
    return Found(cells=list(chosen.values()), peers=list(of_peers.values()))


def load(path: Path) -> Found:
    """The newest records of a file.

    Raises:
        ValueError: there are none, or one is not a record.
    """
    found = newest(read(path))
    if not found.cells:
        raise ValueError(f"{path} holds no records; `python -m bench.prefill --budget-minutes 25` makes them")
    return found


def compare(found: Found) -> list[Comparison]:
    """Every cell of the tables, row by row, the dense ones of a row before the sparse ones."""
    ours = {record.key: record for record in found.cells}
    tables = paper.load()
    return [
        Comparison(
            cell=cell,
            ours=ours.get(key),
            paper_speedup=tables.speedup(*key),
            flops_ratio=None
            if cell.attention == "sparse"
            else _flops(cell.baseline, cell.num_tokens) / _flops(cell.preset, cell.num_tokens),
        )
        for key, cell in tables.cells.items()
    ]
