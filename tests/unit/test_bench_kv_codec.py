"""The benchmark of the codec's quality: its figures, and that either codec's answers are read over its own pages."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.harness.markdown import around
from bench.harness.units import length
from bench.quality import kv_codec
from bench.quality.divergence import divergences
from bench.quality.kv_codec import MARKS, Cell, Experiment, Place
from bench.quality.metrics import perplexity_ratio
from bench.quality.text import Corpus
from colm.checkpoint import Checkpoint
from colm.text.tokenizer import Tokenizer
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = [f"Paragraph {number} has {number * number} words, and no more than that." for number in range(2000)]
CELL = Cell(1100, "float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("codec") / "tiny", tiny_config(max_context=2048), tokenizer=True)


def test_the_divergence_is_kullback_and_leiblers_from_raw_to_int8() -> None:
    raw_TV = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    int8_TV = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    expected = [0.5 * torch.tensor(4 / 3).log().item(), 0.0]
    assert divergences(raw_TV, int8_TV).tolist() == pytest.approx(expected, abs=1e-7)
    assert (divergences(5 * torch.randn(7, 11), 5 * torch.randn(7, 11)) > 0).all()


@pytest.mark.parametrize("place", ["stream", "pages"])
def test_int8_moves_the_answers_a_little_in_half_the_bytes(checkpoint: Checkpoint, place: Place) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None
    outcome = Experiment(checkpoint, Corpus.of(PARTS, tokenizer.encode)).run(CELL._replace(place=place))
    config = checkpoint.config
    rows = 2 * config.num_layers * config.num_kv_heads
    assert outcome.token_bytes == {"raw": rows * config.head_dim * 4, "int8": rows * (config.head_dim + 2)}
    found = outcome.divergence
    assert 0 < found.kl_mean < found.kl_p99 <= found.kl_max < 0.1
    assert 0.9 < found.same_top_share <= 1
    ratio = perplexity_ratio(found.nll_blocks, found.baseline_nll_blocks)
    assert ratio.value != 1
    assert ratio.value == pytest.approx(1, abs=0.01)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.quality.kv_codec", *words])
    kv_codec.main()


@pytest.mark.parametrize("place", ["stream", "pages"])
def test_the_command_keeps_a_record_and_writes_the_table_and_runs_no_cell_twice(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: Place,
) -> None:
    record, page = tmp_path / "kv_codec.jsonl", tmp_path / "quality.md"
    marks, untouched = MARKS[place], "\n".join(MARKS["pages" if place == "stream" else "stream"])
    page.write_text(f"{untouched}\n{marks[0]}\n{marks[1]}\nAfter.\n")
    monkeypatch.setattr(kv_codec, "paragraphs", lambda: PARTS)
    words = ["--model", str(checkpoint.path), "--lengths", "1100", "--dtypes", "float32", "--record", str(record)]
    words += ["--docs", str(tmp_path), "--write-docs", "--json", "--int8", place]
    run(monkeypatch, *words)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(Experiment, "run", lambda *_: pytest.fail("run twice"))
    run(monkeypatch, *words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == first["rows"]
    (row,) = first["rows"]
    assert (row["num_tokens"], row["dtype"], row["place"]) == (*CELL[:2], place)
    assert len(record.read_text().splitlines()) == 1
    assert around(page, *marks) == (f"{untouched}\n", "\nAfter.\n")
    assert f"| {length(CELL.num_tokens)} | float32 | " in page.read_text()
    assert "chain 1, float32" in page.read_text()


def test_a_record_from_before_pages_of_int8_is_of_the_stream() -> None:
    assert Cell.of_json({"num_tokens": 2048, "dtype": "bfloat16"}) == Cell(2048, "bfloat16", "stream")


def test_a_text_beyond_the_context_is_refused_by_name(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", str(checkpoint.path), "--lengths", "4K", "--record", str(tmp_path / "none"))
    assert "--lengths: 4K is beyond the model's context, 2K" in capsys.readouterr().err
