"""One cell of the suite in the records: what was measured whole, on a sample, or modelled, and on what machine."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from bench.harness.contest import Measured
from bench.paper import Attention


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


class Sample(_Strict):
    """What a sample of one layer's tiles says of the same prefill."""

    seconds: Bar
    num_timed: int = Field(ge=1)
    num_tiles: int = Field(ge=1)


class CellRecord(_Strict):
    """A preset at a length."""

    benchmark: str = "bench.prefill"
    environment: dict[str, Any]
    """Of `bench.harness.environment`, the command and the seed."""
    preset: str
    baseline: str
    attention: Attention
    num_tokens: int = Field(ge=1)
    dtype: str
    tile_tokens: int = Field(ge=1)
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

    @property
    def conditions(self) -> tuple[object, ...]:
        """What must be the same for two records to stand for one another."""
        environment = self.environment
        where = tuple(environment.get(name) for name in ("commit", "cpu", "cpu_family", "cpu_model", "threads"))
        return (*where, self.dtype, self.tile_tokens)
