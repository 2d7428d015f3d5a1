"""The benchmark of decode steps, over a tiny checkpoint."""

import json
import sys
from pathlib import Path

import pytest

from bench import decode
from bench.harness.contest import Run, timed
from tests.tiny import tiny_checkpoint


@pytest.fixture(autouse=True)
def small_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain reading of next to nothing."""

    def reading() -> Run:
        return timed(lambda: None, gb=1e-9)

    monkeypatch.setattr(decode, "read_ceiling", reading)


def record_of(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> dict[str, dict[str, float]]:
    """The metrics of each case."""
    monkeypatch.setattr(sys, "argv", ["bench.decode", str(checkpoint), "--rounds", "1", "--json", *words])
    decode.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {case["name"]: case["metrics"] for case in record["cases"]}


def test_every_scale_is_timed_in_both_ways_beside_plain_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = record_of(tiny_checkpoint(tmp_path / "tiny").path, monkeypatch, capsys, "--context", "9")
    assert list(cases) == [f"decode_bf16_scale{scale}_9" for scale in (1, 2, 3)]
    for metrics in cases.values():
        assert {"one_call_gb_per_s", "modules_cpu_s", "read_cpu_s", "over_modules_x", "over_read_x"} <= set(metrics)


def test_a_profile_has_the_parts_of_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = record_of(tiny_checkpoint(tmp_path / "tiny").path, monkeypatch, capsys, "--profile")
    metrics = cases["decode_bf16_scale3_16"]
    parts = {"norms", "qkv", "rotation", "attention", "ffn", "output", "logits", "rest"}
    assert {f"modules_{part}_s" for part in parts} <= set(metrics)
    assert "one_call_logits_s" in metrics
