"""`make audit` tells a clean list from a weak one, and either from a list about which nobody knows anything."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.audit import CLEAN, NOT_AUDITED, WEAK, main

GOOD = {"name": "good", "version": "1.0", "vulns": []}
WEAKNESS = {"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": [], "description": "d"}
BAD = {"name": "bad", "version": "1.0", "vulns": [WEAKNESS]}
SKIPPED = {"name": "far", "skip_reason": "Dependency not found on PyPI and could not be audited: far (1.0)"}


def pip_audit(folder: Path, *, found: list[dict[str, Any]] | None, said: str = "", status: int = 0) -> str:
    """A command that answers as pip-audit does."""
    path = folder / "pip-audit"
    answer = "" if found is None else json.dumps({"dependencies": found, "fixes": []})
    path.write_text(
        f"#!{sys.executable}\nimport sys\nassert '--require-hashes' in sys.argv\n"
        f"print({answer!r}, end='')\nprint({said!r}, file=sys.stderr)\nsys.exit({status})\n"
    )
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("found", "status", "expected", "line"),
    [
        ([GOOD, GOOD], 0, CLEAN, "a.txt: 0 known weaknesses in 2 packages"),
        ([GOOD, BAD], 1, WEAK, "a.txt: bad 1.0: PYSEC-1, repaired in 1.1"),
        (
            [GOOD, SKIPPED],
            0,
            NOT_AUDITED,
            "a.txt: NOT AUDITED IN FULL: the list of known weaknesses cannot be had here",
        ),
        ([BAD, SKIPPED], 1, WEAK, "for 1 of 2 packages, far first"),
    ],
    ids=["clean", "weak", "unknown", "weak and unknown"],
)
def test_what_is_known_is_said_and_is_the_exit_status(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    found: list[dict[str, Any]],
    status: int,
    expected: int,
    line: str,
) -> None:
    """Bug: it stopped at the first list, and pip-audit counts a package without an answer as a clean one."""
    command = pip_audit(tmp_path, found=found, status=status)
    assert main(["a.txt", "b.txt", "--pip-audit", command]) == expected
    out = capsys.readouterr().out
    assert line in out
    assert "b.txt: " in out


def test_no_answer_is_said_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = pip_audit(tmp_path, found=None, said="ConnectionError: no route", status=1)
    assert main(["a.txt", "--pip-audit", command]) == NOT_AUDITED
    assert "a.txt: NOT AUDITED: ConnectionError: no route" in capsys.readouterr().out
