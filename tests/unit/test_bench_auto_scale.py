"""The benchmark of automatic scale, over a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from bench import auto_scale
from tests.tiny import tiny_checkpoint


def test_answers_of_both_kinds_take_turns_under_load_and_every_token_says_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "tiny").path
    load = [
        "--clients",
        "1",
        "5",
        "--prompt-tokens",
        "9",
        "--new-tokens",
        "5",
        "--seconds",
        "0.3",
        "--max-requests",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.auto_scale", str(model), *load, "--rounds", "1", "--json"])
    auto_scale.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["name"] for case in record["cases"]] == ["auto_scale_1_clients", "auto_scale_5_clients"]
    for case in record["cases"]:
        metrics = {name: value["median"] for name, value in case["metrics"].items()}
        assert {"over_full_x", "auto_token_p95_s", "full_token_p50_s", "full_expired_fraction"} <= metrics.keys()
        assert metrics["full_chains3_fraction"] == 1
        shares = [metrics[f"auto_chains{num_chains}_fraction"] for num_chains in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert (metrics["auto_refused_fraction"] > 0) == (case["shape"]["num_clients"] == 5)
