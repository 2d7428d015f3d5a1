"""The benchmark of drafts, over tiny models."""

import json
import sys
from pathlib import Path

import pytest

from bench import draft
from colm.model.config import ChainConfig
from decode_node.drafter import Drafter
from tests.tiny import tiny_checkpoint, tiny_config


def test_answers_with_and_without_drafts_take_turns_and_spoilt_drafts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def preset(name: str) -> ChainConfig:
        assert name == "tiny"
        return tiny_config()

    def num_drafts(drafter: Drafter, num_answers: int) -> int:
        assert num_answers <= 2
        return min(3, drafter._max_draft_tokens)

    model = tiny_checkpoint(tmp_path / "tiny").path
    monkeypatch.setattr(draft, "preset", preset)
    monkeypatch.setattr(Drafter, "num_drafts", num_drafts)
    words = ["--preset", "tiny", "--acceptance", "1", "0.5", "--batch", "2", "--context", "9", "--new-tokens", "21"]
    monkeypatch.setattr(sys, "argv", ["bench.draft", *words, "--model", str(model), "--rounds", "1", "--json"])
    draft.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["name"] for case in record["cases"]] == [f"draft_4-2-2_a{each}_b2_9" for each in ("1", "0.5", "1")]
    right, spoilt, _ = record["cases"]
    for case in record["cases"]:
        assert {"plain_tokens_per_s", "off_token_cpu_s", "over_plain_x", "over_off_x", "chain1_1_s", "all_9_s"} <= set(
            case["metrics"]
        )
        assert "off_drafted_fraction" not in case["metrics"]
    accepted, drafted = (
        [case["metrics"][f"drafts_{what}_fraction"]["median"] for case in (right, spoilt)]
        for what in ("accepted", "drafted")
    )
    assert accepted[0] == drafted[0] == pytest.approx(15 / 21, rel=1e-3)
    assert accepted[1] < drafted[1]
