"""The file of outcomes: a line a cell, so that what is done is not done again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.quality.cells import Cell
from bench.quality.experiment import Outcome


class Records:
    """Outcomes of one setting in a file that may hold others too.

    Args:
        path: of the file, JSON lines; it need not exist.
        setting: of the experiment.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self._path = path
        self._setting = dict(setting)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        mine = [record for line in lines if (record := json.loads(line))["setting"] == self._setting]
        self.outcomes = {Cell.of_json(record["cell"]): Outcome.of_json(record["outcome"]) for record in mine}
        """By cell, in the order of the file."""
        self.environments = [record["environment"] for record in mine]
        """In which each was made."""

    def add(self, cell: Cell, outcome: Outcome, environment: Mapping[str, Any]) -> None:
        """Write an outcome at once."""
        record = {
            "cell": cell.as_json(),
            "outcome": outcome.as_json(),
            "setting": self._setting,
            "environment": dict(environment),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.outcomes[cell] = outcome
        self.environments.append(dict(environment))
