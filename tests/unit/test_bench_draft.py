"""The benchmark of drafts, over tiny models."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import draft
from bench.decode import loaded
from bench.decode.loaded import Source
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
    monkeypatch.setattr(loaded, "preset", preset)
    monkeypatch.setattr(Drafter, "num_drafts", num_drafts)
    words = ["--preset", "tiny", "--acceptance", "1", "0.5", "--batch", "2", "--context", "9", "--new-tokens", "21"]
    monkeypatch.setattr(sys, "argv", ["bench.draft", *words, "--model", str(model), "--rounds", "1", "--json"])
    draft.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["name"] for case in record["cases"]] == [f"draft_4-2-2_{each}_b2_9" for each in ("a1", "a0.5", "own")]
    right, spoilt, _ = record["cases"]
    for case in record["cases"]:
        assert {
            "plain_tokens_per_s",
            "drafts_token_cpu_s",
            "first_tokens_per_s",
            "over_plain_x",
            "draft_1_s",
            "all_9_s",
        } <= set(case["metrics"])
        assert "plain_drafted_fraction" not in case["metrics"]
    accepted, drafted = (
        [case["metrics"][f"drafts_{what}_fraction"]["median"] for case in (right, spoilt)]
        for what in ("accepted", "drafted")
    )
    assert accepted[0] == drafted[0] == pytest.approx(15 / 21, rel=1e-3)
    assert accepted[1] < drafted[1]


def test_the_suite_has_a_bar_for_each_model_whose_chains_agree_and_drafts_that_are_off_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draft, "MODEL", tiny_checkpoint(tmp_path / "tiny").path)
    monkeypatch.setattr(draft, "DraftCase", partial(draft.DraftCase, new_tokens=9))
    monkeypatch.setattr(sys, "argv", ["bench.draft", "--quick", "--json"])
    draft.main()
    agreeing, own, off = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    names = ["draft_4-2-2_a1_b1_512", "draft_4-2-2_own_b1_6,400", "off_4-2-2_own_b1_512"]
    assert [case["name"] for case in (agreeing, own, off)] == names
    for case, wanted in ((agreeing, 1.15), (own, draft.OFF_OF_PLAIN)):
        assert case["metrics"]["drafts_of_plain_bar_x"] == wanted
    assert off["metrics"]["off_of_plain_bar_x"] == draft.OFF_OF_PLAIN
    assert off["metrics"]["off_of_plain_x"]["n"] == draft.OFF_TURNS
    wanted = {(case.source.name, case.acceptance): case.wanted for case in draft.suite(quick=False)}
    assert wanted[draft.PRESET, 1.0] == 2.5
    assert wanted[draft.PRESET, 0.7] == 1.7


def test_agreeing_chains_leave_chain_1_as_it_is_and_add_nothing_to_its_logits(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    names = ["head.chain1", "head.chain2", "head.chain3", "embedding.chain2"]
    kept, agreeing = checkpoint.tensors(names), Source(str(checkpoint.path), has_agreeing_chains=True).checkpoint
    for name, tensor in agreeing.tensors(names).items():
        expected = torch.zeros_like(tensor) if name in ("head.chain2", "head.chain3") else kept[name]
        assert torch.equal(tensor, expected)
