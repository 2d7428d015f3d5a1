"""The benchmark of decode steps, over a tiny checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.decode import __main__ as command
from bench.decode import attention, step
from bench.decode.loaded import Models, Source
from bench.harness.contest import Run, timed
from bench.kernels.decode import DecodeCase as KernelCase
from tests.tiny import tiny_checkpoint, tiny_config


@pytest.fixture(autouse=True)
def small_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain reading of next to nothing."""

    def reading() -> Run:
        return timed(lambda: None, gb=1e-9)

    for module in (step, attention):
        monkeypatch.setattr(module, "read_ceiling", reading)


def record_of(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> dict[str, dict[str, Any]]:
    """The metrics of each case of one model."""
    return metrics_of(run_with(monkeypatch, capsys, str(checkpoint), *words))


def run_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The record."""
    monkeypatch.setattr(sys, "argv", ["bench.decode", "--rounds", "1", "--json", *words])
    command.main()
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def metrics_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
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


def test_the_suite_has_every_way_of_a_step_batches_and_attention_and_says_why_a_peer_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(hidden_dim=8 * 32))
    monkeypatch.setattr(command, "MODEL", Source(str(checkpoint.path)))
    monkeypatch.setattr(command, "GGUF", tmp_path / "missing.gguf")
    monkeypatch.setattr(attention, "CACHE_BYTES", 1)
    small = KernelCase(batch=2, context_len=128, num_kv_heads=1, group=2, head_dim=16)
    monkeypatch.setattr(command, "attention_cases", lambda: [attention.AttentionCase(kernel=small)])
    record = run_with(monkeypatch, capsys, "--quick")
    assert list(record["absent"]) == ["llama.cpp"]
    cases = metrics_of(record)
    steps, batches = [f"decode_bf16_scale{scale}_512" for scale in (1, 2)], [f"batch_bf16_scale{n}_256" for n in (1, 2)]
    assert list(cases) == [*steps, *batches, f"attention_{small.name}"]
    for name in steps:
        ways = {"one_call", "int8", "q4", "int8_pages", "read"}
        assert {f"{way}_gb_per_s" for way in ways} | {"of_reading_x", "of_reading_bar_x"} <= set(cases[name])
    for name in batches:
        assert cases[name]["of_a_batch_bar_x"] == 8
        assert {f"answers_{size}_tokens_per_s" for size in (1, 4, 16)} <= set(cases[name])
    assert {"bf16_of_reading_x", "int8_of_reading_x"} <= set(cases[f"attention_{small.name}"])


def test_pages_are_as_many_as_the_largest_case_of_a_model_and_one_model_is_held_at_a_time(tmp_path: Path) -> None:
    models = Models()
    one, other = (Source(str(tiny_checkpoint(tmp_path / name, tiny_config()).path)) for name in ("one", "other"))
    for source, context_len, num_answers in ((one, 65, 3), (one, 200, 1), (other, 64, 1)):
        models.expect(source, context_len, num_answers)
    loaded = models.loaded(one, torch.float32)
    assert loaded is models.loaded(one, torch.float32)
    pages = {int(page) for row in loaded.plan(1, 65, 3).rows for page in row.table_M}
    assert pages == set(range(6))
    assert models.loaded(other, torch.float32) is not loaded
    assert models.loaded(one, torch.float32) is not loaded
