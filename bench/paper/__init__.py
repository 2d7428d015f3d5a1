"""The paper's prefill times as numbers, by the names of `colm.model.presets`; cells that it has wrong carry the reason.

`prefill_tables.json` names the tables. Facts alone: no sentence of the paper is here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from bench.harness.units import parse_length
from colm.model.config import ChainConfig
from colm.model.presets import preset

Attention = Literal["dense", "sparse"]
"""Sparse is MInference in the paper."""
Kind = Literal["baseline", "same-config", "same-params"]

PATH: Final = Path(__file__).parent / "prefill_tables.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperCell:
    """One time of the tables."""

    preset: str
    baseline: str
    """The preset that its speed-up is over."""
    kind: Kind
    attention: Attention
    num_tokens: int
    seconds: float
    suspect: str | None
    """Why the figure is not to be used; None if it is."""

    @property
    def key(self) -> tuple[str, Attention, int]:
        """What a cell of ours is compared by."""
        return self.preset, self.attention, self.num_tokens

    @property
    def config(self) -> ChainConfig:
        """The model."""
        return preset(self.preset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """All cells."""

    source: str
    cells: Mapping[tuple[str, Attention, int], PaperCell]
    """By preset, attention and tokens, in the order of the tables."""

    @property
    def rows(self) -> dict[str, str]:
        """The baseline of each preset, in the order of the tables."""
        return {cell.preset: cell.baseline for cell in self.cells.values()}

    def speedup(self, name: str, attention: Attention, num_tokens: int) -> float | None:
        """The dense baseline's time over this cell's; None where either is missing or suspect."""
        cell = self.cells.get((name, attention, num_tokens))
        base = self.cells.get((self.rows[name], "dense", num_tokens)) if name in self.rows else None
        if cell is None or base is None or cell.suspect or base.suspect:
            return None
        return base.seconds / cell.seconds


@cache
def load() -> Paper:
    """The tables, from the file."""
    body: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    suspects = {
        (each["preset"], each["column"], length): each["reason"]
        for each in body["suspect"]
        for length in each["lengths"]
    }
    columns: dict[str, Attention] = {"dense_s": "dense", "sparse_s": "sparse"}
    cells = [
        PaperCell(
            preset=row["preset"],
            baseline=row["baseline"],
            kind=row["kind"],
            attention=attention,
            num_tokens=parse_length(length),
            seconds=seconds,
            suspect=suspects.get((row["preset"], column, length)),
        )
        for row in body["rows"]
        for column, attention in columns.items()
        for length, seconds in row[column].items()
    ]
    return Paper(source=body["source"], cells={cell.key: cell for cell in cells})
