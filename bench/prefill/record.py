"""One cell of the suite in the records: what was measured whole, on a sample, or modelled, and on what machine.

A file of records holds cells and what peers took beside them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from bench.harness import records
from bench.harness.contest import Measured
from bench.paper import Attention
from bench.prefill.estimate import Estimate


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bar(_Strict):
    """A value between two others: of several rounds the median, lowest and highest; of a sample two standard errors."""

    value: float = Field(gt=0)
    low: float = Field(ge=0)
    high: float = Field(gt=0)

    @classmethod
    def around(cls, value: float, error: float) -> Self:
        """Two standard errors to either side."""
        return cls(value=value, low=max(0.0, value - 2 * error), high=value + 2 * error)

    @classmethod
    def over(cls, values: Sequence[float]) -> Self:
        """Median, lowest and highest."""
        return cls(value=median(values), low=min(values), high=max(values))


AGREES_WITHIN = 0.05
"""How far a sample may be off the whole."""


class Sample(_Strict):
    """What a sample of one layer's tiles says of the same prefill."""

    seconds: Bar
    num_timed: int = Field(ge=1)
    num_tiles: int = Field(ge=1)
    off: float | None = None
    """The share of the whole's time by which it is off, below zero where it is too short; None where only it ran."""
    agrees: bool | None = None
    """Whether that is within `AGREES_WITHIN`."""

    @classmethod
    def of(cls, found: Estimate, whole_s: float | None) -> Self:
        """An estimate beside the whole's seconds, if it ran."""
        off = None if whole_s is None else found.total / whole_s - 1
        return cls(
            seconds=Bar.around(found.total, found.standard_error),
            num_timed=found.num_timed,
            num_tiles=found.num_tiles,
            off=off,
            agrees=None if off is None else abs(off) <= AGREES_WITHIN,
        )


class Sparse(_Strict):
    """What sparse attention kept."""

    keys_per_row: int = Field(ge=1)
    """Keys that a row of a kv head was given at most."""
    audit_floor: float


def where(environment: Mapping[str, Any]) -> tuple[object, ...]:
    """What of an environment must be the same."""
    return tuple(environment.get(name) for name in ("commit", "cpu", "cpu_family", "cpu_model", "threads"))


class _Measured(_Strict):
    environment: dict[str, Any]
    """Of `bench.harness.environment`, the command and the seed."""
    num_tokens: int = Field(ge=1)
    dtype: str
    tile_tokens: int = Field(ge=1)

    @property
    def conditions(self) -> tuple[object, ...]:
        """What must be the same for two records to stand for one another."""
        return (*where(self.environment), self.dtype, self.tile_tokens)


class CellRecord(_Measured):
    """A preset at a length."""

    benchmark: Literal["bench.prefill"] = "bench.prefill"
    preset: str
    baseline: str
    attention: Attention
    sparse: Sparse | None = None
    measured: Measured
    reason: str
    """Why it was not measured whole; empty if it was."""
    seconds: Bar
    over_baseline: Bar
    """The baseline's time over this one's, both of this run and measured in the same way."""
    num_rounds: int = Field(ge=0)
    sample: Sample | None
    """Also of a prefill that was measured whole, so that the two can be compared."""
    machine: str | None
    """The machine file behind a modelled cell."""

    @property
    def key(self) -> tuple[str, Attention, int]:
        """What the paper's cells are found by."""
        return self.preset, self.attention, self.num_tokens

    @property
    def tokens_per_s(self) -> float:
        """At the median, or the estimate."""
        return self.num_tokens / self.seconds.value


class PeerRecord(_Measured):
    """Other software on a baseline's shape, in the same turns as the rows of its group."""

    benchmark: Literal["bench.prefill.peer"] = "bench.prefill.peer"
    peer: str
    version: str
    """Of the software; empty where it is absent."""
    baseline: str
    """The preset whose shape it runs."""
    reason: str
    """Why it is absent; empty if it ran."""
    seconds: Bar | None
    num_rounds: int = Field(ge=0)
    speedups: dict[str, Bar]
    """Its time over that of each of our presets, dense, of the same rounds."""

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from others of the same conditions."""
        return self.peer, self.num_tokens


_KINDS: dict[str, type[CellRecord] | type[PeerRecord]] = {
    "bench.prefill": CellRecord,
    "bench.prefill.peer": PeerRecord,
}


def read(path: Path) -> list[CellRecord | PeerRecord]:
    """All records of a file, in their order.

    Raises:
        ValueError: a line is not a record.
    """
    found: list[CellRecord | PeerRecord] = []
    for number, line in enumerate(records.read(path), start=1):
        kind = line.get("benchmark")
        if kind not in _KINDS:
            raise ValueError(f"{path}:{number}: benchmark={kind!r} is unknown; use one of {', '.join(_KINDS)}")
        found.append(_KINDS[kind].model_validate(line))
    return found


def cells(found: Sequence[CellRecord | PeerRecord]) -> list[CellRecord]:
    """Those of our own rows."""
    return [record for record in found if isinstance(record, CellRecord)]


def peers(found: Sequence[CellRecord | PeerRecord]) -> list[PeerRecord]:
    """Those of other software."""
    return [record for record in found if isinstance(record, PeerRecord)]
