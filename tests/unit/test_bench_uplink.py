"""The benchmark of what comes up from a decode node, over a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from bench import uplink
from colm.checkpoint import Checkpoint
from colm.dtypes import fastest_dtype
from colm.kv import KvFormat
from colm.placement import CPU
from prefill_node import prefix_uplink
from prefill_node.prefix_uplink import PrefixUplinks
from tests.tiny import tiny_checkpoint


def test_a_forgotten_document_is_computed_or_comes_up_and_the_answers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "tiny").path
    monkeypatch.setattr(PrefixUplinks, "_compute_s", lambda *_: 1e6)
    monkeypatch.setattr(prefix_uplink, "IDLE_S", 1e6)
    asked = ["--tokens", "70", "--tile-tokens", "64", "--rounds", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench.uplink", str(model), *asked])
    uplink.main()
    (case,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    metrics = {name: value["median"] for name, value in case["metrics"].items()}
    assert {"computed_s", "moved_s", "kept_s", "over_computed_x"} <= metrics.keys()
    kv_format = KvFormat.of(Checkpoint.open(model).config, fastest_dtype(CPU))
    assert metrics["computed_up_bytes"] == 0
    assert metrics["moved_up_bytes"] == 64 * kv_format.token_bytes
