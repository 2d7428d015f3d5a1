"""The benchmark of quantised weights' quality: the reordered model, the figures, and the command."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.quality import weights
from bench.quality.divergence import Divergence
from bench.quality.metrics import perplexity_ratio
from bench.quality.reordered import reorder
from bench.quality.text import Corpus
from bench.quality.weights import MARKS, Cell, Experiment, Outcome
from colm.checkpoint import Checkpoint
from colm.errors import UnsupportedModel
from colm.text.tokenizer import Tokenizer
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = [f"Paragraph {number} has {number * number} words, and no more than that." for number in range(2000)]
Q4 = Cell(1100, "float32", is_reordered=False, num_chains=3, quantisation="q4", of_kv=False)

OUTCOME = Outcome(
    divergence=Divergence(
        baseline_nll_blocks=[2.0, 3.0], nll_blocks=[2.5, 3.5], kl_mean=0.5, kl_p99=1.0, kl_max=2.0, same_top_share=0.9
    ),
    weight_bytes=96_000_000,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = tiny_config(max_context=2048, hidden_dim=8 * 32)
    return tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", config, tokenizer=True)


@pytest.mark.parametrize("overrides", [{}, {"tie_embeddings": True, "chains": (2, 4)}, {"num_kv_heads": 1}])
def test_a_reordered_model_computes_the_same_by_other_weights(tmp_path: Path, overrides: dict) -> None:
    """In float64, where another order of a sum shows in the last digits alone."""
    source = tiny_checkpoint(tmp_path / "source", tiny_config(**overrides))
    other = reorder(source, tmp_path / "other")
    tokens = torch.arange(24).view(2, 12)
    for scale in range(1, source.config.num_chains + 1):
        expected, found = (each.load(dtype=torch.float64)(tokens, scale) for each in (source, other))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = other.load().state_dict(), source.load().state_dict()
    moved = {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}
    assert moved == set(ours)


@pytest.mark.parametrize("overrides", [{"bias": True}, {"activation": "gelu"}])
def test_models_that_are_not_reordered_are_refused(tmp_path: Path, overrides: dict) -> None:
    with pytest.raises(UnsupportedModel, match="only gated models without biases"):
        reorder(tiny_checkpoint(tmp_path / "source", tiny_config(**overrides)), tmp_path / "other")


def test_int8_moves_the_answers_less_than_q4_and_reads_more(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None
    experiment = Experiment(checkpoint, Corpus.of(PARTS, tokenizer.encode), tmp_path)
    q4, int8 = experiment.run(Q4), experiment.run(Q4._replace(quantisation="int8", is_reordered=True))
    assert 0 < int8.divergence.kl_mean < q4.divergence.kl_mean < 0.2
    assert q4.weight_bytes < int8.weight_bytes
    ratio = perplexity_ratio(q4.divergence.nll_blocks, q4.divergence.baseline_nll_blocks)
    assert ratio.value == pytest.approx(1, abs=0.1)


def test_the_command_keeps_a_record_and_writes_the_table_and_runs_no_cell_twice(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "quality.md"
    page.write_text(f"Before.\n{MARKS[0]}\n{MARKS[1]}\nAfter.\n")
    monkeypatch.setattr(weights, "paragraphs", lambda: PARTS)
    monkeypatch.setattr(Experiment, "run", lambda *_: OUTCOME)
    words = ["--model", str(checkpoint.path), "--lengths", "1100", "--dtypes", "float32", "--scales", "1", "3"]
    words += ["--docs", str(tmp_path)]
    words += ["--record", str(tmp_path / "weights.jsonl"), "--write-docs", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench.quality.weights", *words])
    weights.main()
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(Experiment, "run", lambda *_: pytest.fail("run twice"))
    weights.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == first["rows"]
    assert len(first["rows"]) == 2 * 2 * 2 * 2
    assert (
        "| q4, all | 96 | 12.182 | 20.086 | 1.6487 ± 0.0000 | 0.50000 | 1.00000 | 2.00000 | 90.0% |" in page.read_text()
    )
    assert "scales 1 and 3, float32" in page.read_text()
