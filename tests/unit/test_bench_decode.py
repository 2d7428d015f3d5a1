"""The benchmark of decode steps, over a tiny checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import decode
from bench.harness.contest import Run, timed
from tests.tiny import tiny_checkpoint, tiny_config


@pytest.fixture(autouse=True)
def small_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain reading of next to nothing."""

    def reading() -> Run:
        return timed(lambda: None, gb=1e-9)

    monkeypatch.setattr(decode, "read_ceiling", reading)


def record_of(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> dict[str, dict[str, Any]]:
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


def test_quantised_weights_are_timed_beside_the_stored_and_read_fewer_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(hidden_dim=8 * 32))
    words = ("--context", "9", "--answers", "3", "--weights", "int8", "q4")
    cases = record_of(checkpoint.path, monkeypatch, capsys, *words)
    metrics = cases["decode_bf16_scale3_9_r3"]

    def read_bytes(name: str) -> float:
        return metrics[f"{name}_s"]["median"] * metrics[f"{name}_gb_per_s"]["median"]

    assert read_bytes("q4") < read_bytes("int8") < read_bytes("one_call")
    assert metrics["q4_tokens_per_s"]["median"] == pytest.approx(3 / metrics["q4_s"]["median"], rel=1e-3)
