"""The file of outcomes: a line a cell, so that what is done is not done again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from bench.harness import records


class AsJson(Protocol):
    """What a record holds."""

    def as_json(self) -> dict[str, Any]:
        """For the record."""

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""


CellT = TypeVar("CellT", bound=AsJson)
OutcomeT = TypeVar("OutcomeT", bound=AsJson)


class Records(Generic[CellT, OutcomeT]):
    """Outcomes of one setting in a file that may hold others too.

    Args:
        path: of the file, JSON lines; it need not exist.
        setting: of the experiment.
        cell: the class of its cells, hashable.
        outcome: the class of its outcomes.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any], cell: type[CellT], outcome: type[OutcomeT]) -> None:
        self._path = path
        self._setting = dict(setting)
        mine = [record for record in records.read(path) if record["setting"] == self._setting]
        self.outcomes = {cell.of_json(record["cell"]): outcome.of_json(record["outcome"]) for record in mine}
        """By cell, in the order of the file."""
        self._environments: dict[CellT, Mapping[str, Any]] = {
            cell.of_json(record["cell"]): record["environment"] for record in mine
        }

    @property
    def environments(self) -> list[Mapping[str, Any]]:
        """In which the outcomes were made, in their order."""
        return list(self._environments.values())

    def environment_of(self, cell: CellT) -> Mapping[str, Any]:
        """In which an outcome was made."""
        return self._environments[cell]

    def add(self, cell: CellT, outcome: OutcomeT, environment: Mapping[str, Any]) -> None:
        """Write an outcome at once."""
        record = {
            "cell": cell.as_json(),
            "outcome": outcome.as_json(),
            "setting": self._setting,
            "environment": dict(environment),
        }
        records.append(self._path, [record])
        self.outcomes[cell] = outcome
        self._environments[cell] = dict(environment)
