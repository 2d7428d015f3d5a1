"""Benchmarks held against a stored record: what has changed, what has not, and what cannot be told."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.compare import Timing, changes, timings

CPU = {"vendor_id_raw": "V", "brand_raw": "A", "family": 25, "model": 17, "count": 2}


def record(times: dict[str, tuple[float, float]], **cpu: Any) -> dict[str, Any]:
    """As pytest-benchmark writes it."""
    benchmarks = [
        {"fullname": name, "stats": {"median": median, "iqr": iqr, "data": [median] * 3}}
        for name, (median, iqr) in times.items()
    ]
    return {"machine_info": {"cpu": CPU | cpu, "python_version": "3.11"}, "benchmarks": benchmarks}


@pytest.mark.parametrize(
    ("stored", "fresh", "verdict"),
    [
        ((1.0, 0.0), (1.04, 0.0), "no change"),
        ((1.0, 0.0), (1.06, 0.0), "worse"),
        ((1.0, 0.0), (0.94, 0.0), "improved"),
        ((1.0, 0.1), (1.19, 0.0), "no change"),
        ((1.0, 0.0), (0.81, 0.09), "no change"),
        ((1.0, 0.1), (1.21, 0.0), "worse"),
        (None, (1.0, 0.0), "new"),
        ((1.0, 0.0), None, "gone"),
    ],
)
def test_a_case_has_changed_where_it_leaves_the_band_of_its_own_rounds(
    stored: tuple[float, float] | None, fresh: tuple[float, float] | None, verdict: str
) -> None:
    def one(times: tuple[float, float] | None) -> dict[str, Timing]:
        return {} if times is None else {"case": Timing(median_s=times[0], iqr_s=times[1])}

    (change,) = changes(one(stored), one(fresh))
    assert change.verdict == verdict


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.compare", *words])
    return compare.main()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "fresh.json", tmp_path / "stored.json"


def test_what_is_worse_is_named_and_fails(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, stored = files
    fresh.write_text(json.dumps(record({"a": (2.0, 0.0), "b": (1.0, 0.0)})))
    stored.write_text(json.dumps(record({"a": (1.0, 0.0), "b": (1.0, 0.0)})))
    assert run(monkeypatch, str(fresh), str(stored), "--json") == 1
    out = capsys.readouterr().out
    assert "0 improved, 1 worse, 0 new, 0 gone, 1 no change" in out
    cases = json.loads(out.splitlines()[-1])["cases"]
    assert [(case["name"], case["verdict"], case["ratio"]) for case in cases] == [
        ("a", "worse", 2.0),
        ("b", "no change", 1.0),
    ]


def test_another_machines_record_is_compared_with_nothing(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, stored = files
    fresh.write_text(json.dumps(record({"a": (2.0, 0.0)}, model=18)))
    stored.write_text(json.dumps(record({"a": (1.0, 0.0)})))
    assert run(monkeypatch, str(fresh), str(stored)) == 0
    assert "of another machine" in capsys.readouterr().out


def test_a_record_that_is_kept_has_no_single_rounds_and_compares_with_itself(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, stored = files
    fresh.write_text(json.dumps(record({"a": (2.0, 0.1)})))
    assert run(monkeypatch, str(fresh), str(stored), "--store") == 0
    kept = json.loads(stored.read_text())
    assert "data" not in kept["benchmarks"][0]["stats"]
    assert timings(kept) == {"a": Timing(median_s=2.0, iqr_s=0.1)}
    assert run(monkeypatch, str(fresh), str(stored)) == 0
    assert "1 no change" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"benchmarks": [{}]}'])
def test_what_is_no_record_is_an_error(
    text: str, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, stored = files
    fresh.write_text(text)
    assert run(monkeypatch, str(fresh), str(stored)) == 2
    assert capsys.readouterr().out.startswith("error: ")
