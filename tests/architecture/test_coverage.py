"""`tests/COVERAGE.md` names tests that exist, and forgets no file of faults."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "tests" / "COVERAGE.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
ROW = re.compile(r"^\|(?! risk \||---)(.*)\|$", re.MULTILINE)


def names_in(file: str) -> set[str]:
    """Functions and classes at the top of a file, and what is assigned there, such as a state machine's tests."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    names = {each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assigned = (target for each in body if isinstance(each, ast.Assign) for target in each.targets)
    return names | {target.id for target in assigned if isinstance(target, ast.Name)}


def test_every_named_test_exists() -> None:
    assert len(NAMED) > 40
    assert [f"{file}::{name}" for file, name in NAMED if not (ROOT / file).exists()] == []
    assert [f"{file}::{name}" for file, name in NAMED if name not in names_in(file)] == []


def test_every_line_has_a_risk_a_scenario_a_test_and_a_status() -> None:
    rows = [[cell.strip() for cell in row.split("|")] for row in ROW.findall(PAGE)]
    assert len(rows) == len(NAMED)
    assert [row for row in rows if len(row) != 4 or not all(row)] == []
    assert {row[3].split(":")[0].split(",")[0] for row in rows} <= {"tested", "by hand"}


def test_every_file_of_faults_is_named() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "fault").glob("test_*.py")}
    assert files - {file for file, _ in NAMED} == {"tests/fault/test_progress.py"}  # no fault: how far a tile is
