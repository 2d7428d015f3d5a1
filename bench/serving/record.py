"""One window of load on one system, in the records: every request, and what the processes used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, ValidationError, model_validator

from bench.harness import records
from bench.harness.contest import Measured
from bench.serving.outcome import Answered, Objective, Summary
from bench.serving.systems import Name
from bench.serving.trace import Load, Strict
from bench.serving.usage import RoleUsage


class WindowRecord(Strict):
    """A window."""

    benchmark: str = "bench.serving"
    measured: Measured = "whole"
    environment: dict[str, Any]
    """Of `bench.harness.environment`, the command and the date."""
    run: str
    """What all windows of one command have in common."""
    system: Name
    model: str
    dtype: str
    round: NonNegativeInt
    seed: NonNegativeInt
    timeout_s: PositiveFloat
    load: Load
    objective: Objective
    busy_s: PositiveFloat
    """From the beginning of the window until the last request had ended."""
    usage: dict[str, RoleUsage]
    """By role, over that time; `client` is the benchmark itself."""
    requests: list[Answered] = Field(min_length=1)
    summary: Summary

    @model_validator(mode="after")
    def _closed(self) -> Self:
        """Every request that was to arrive has one outcome, and the summary is theirs."""
        if len(self.requests) != self.load.num_requests:
            raise ValueError(f"{len(self.requests)} requests have an outcome, and {self.load.num_requests} arrived")
        if self.summary != Summary.of(self.requests, self.objective, self.load.seconds):
            raise ValueError("the summary is not that of the requests")
        return self

    @property
    def server_cpu_s(self) -> float:
        """Processor seconds of all roles but the client."""
        return sum(each.cpu_s for role, each in self.usage.items() if role != "client")

    @property
    def server_peak_bytes(self) -> int:
        """The sum of the roles' peaks, without the client's."""
        return sum(each.peak_bytes for role, each in self.usage.items() if role != "client")


def last_run(path: Path) -> list[WindowRecord]:
    """The windows of the last command that wrote into a file; none where there is no file.

    Raises:
        ValueError: a line is not such a record, with its number.
    """
    found = []
    for number, each in enumerate(records.read(path), start=1):
        try:
            found.append(WindowRecord.model_validate(each))
        except ValidationError as err:
            raise ValueError(f"{path}:{number} is no record of bench.serving: {err}") from err
    return [each for each in found if each.run == found[-1].run]


def pooled(windows: Sequence[WindowRecord]) -> Summary:
    """All rounds of one system under one load, as one."""
    requests = [each for window in windows for each in window.requests]
    return Summary.of(requests, windows[0].objective, sum(window.load.seconds for window in windows))
