"""The quality benchmark: its figures, where facts lie, what it runs, and that what it read is what the model says.

Shapes: B sequences, T tokens, N tokens of a prompt, V vocabulary.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from bench.quality import __main__ as command
from bench.quality.cells import BASELINE, NUM_CONTINUED, Budget, Cell, cells
from bench.quality.experiment import NUM_BLOCKS, NUM_SCORED, Experiment, Outcome
from bench.quality.metrics import (
    block_means,
    clopper_pearson,
    negative_log_likelihoods,
    perplexity,
    perplexity_ratio,
)
from bench.quality.reading import Reading
from bench.quality.records import Records
from bench.quality.report import BEGIN, END, rows, write_table
from bench.quality.text import PLACES, Corpus, exam, facts, paragraphs
from colm.checkpoint import Checkpoint
from colm.errors import ConfigError
from colm.kv import KvFormat
from colm.model.config import RopeScaling
from colm.text.tokenizer import Tokenizer
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS = 2048
CONTEXT = 4096
DENSE = Cell(num_tokens=NUM_TOKENS, text=0, budget=BASELINE)
KEYS = replace(DENSE, budget=Budget(kind="keys", size=512))
PARTS = [f"Paragraph {number} has {number * number} words, and no more than that." for number in range(2000)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("quality") / "tiny", tiny_config(max_context=CONTEXT), tokenizer=True
    )


@pytest.fixture(scope="module")
def encode(checkpoint: Checkpoint) -> Callable[[str], NDArray[np.int64]]:
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None
    return tokenizer.encode


@pytest.fixture(scope="module")
def corpus(encode: Callable[[str], NDArray[np.int64]]) -> Corpus:
    return Corpus.of(PARTS, encode)


@pytest.fixture(scope="module")
def experiment(checkpoint: Checkpoint, corpus: Corpus, encode: Callable[[str], NDArray[np.int64]]) -> Experiment:
    return Experiment(checkpoint, corpus, encode, dtype=torch.float32, seed=0, num_facts=3)


def test_negative_log_likelihoods_are_those_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = 5 * torch.randn(7, 11, generator=generator)
    token_ids_T = torch.randint(11, (7,), generator=generator)
    pairs = zip(logits_TV.tolist(), token_ids_T.tolist(), strict=True)
    direct = [-math.log(math.exp(row[token_id]) / sum(map(math.exp, row))) for row, token_id in pairs]
    assert negative_log_likelihoods(logits_TV, token_ids_T).tolist() == pytest.approx(direct, rel=1e-12)


def test_the_perplexity_of_blocks_is_that_of_their_tokens() -> None:
    probabilities = [0.5, 0.25, 0.125, 0.1, 0.9, 0.3]
    blocks = block_means([-math.log(p) for p in probabilities], 3)
    assert len(blocks) == 3
    assert perplexity(blocks) == pytest.approx(math.prod(probabilities) ** (-1 / 6))


def test_blocks_are_of_equal_length() -> None:
    with pytest.raises(ValueError, match="7 values do not divide into 3 equal blocks"):
        block_means([0.0] * 7, 3)


def test_a_ratio_is_taken_block_by_block_with_the_error_of_the_differences() -> None:
    baseline = [1.0, 3.0, 2.0, 5.0]
    same = perplexity_ratio([each + 0.1 for each in baseline], baseline)
    assert same.value == pytest.approx(math.exp(0.1))
    assert same.error == pytest.approx(0.0, abs=1e-12)
    apart = perplexity_ratio([1.1, 3.1, 2.3, 5.3], baseline)  # differences of mean 0.2 and deviation sqrt(0.04 / 3)
    assert apart.value == pytest.approx(math.exp(0.2))
    assert apart.error == pytest.approx(math.exp(0.2) * math.sqrt(0.04 / 3) / 2)


@pytest.mark.parametrize(
    ("num_found", "num_asked", "low", "high"),
    [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (1, 1, 0.025, 1.0), (8, 10, 0.4439, 0.9748)],
)
def test_the_interval_is_clopper_and_pearsons(num_found: int, num_asked: int, low: float, high: float) -> None:
    assert clopper_pearson(num_found, num_asked) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 60).flatmap(lambda asked: st.tuples(st.integers(0, asked), st.just(asked))))
def test_beyond_each_end_of_the_interval_the_result_is_too_unlikely(counts: tuple[int, int]) -> None:
    num_found, num_asked = counts
    low, high = clopper_pearson(num_found, num_asked)

    def probability(of: range, share: float) -> float:
        return sum(math.comb(num_asked, i) * share**i * (1 - share) ** (num_asked - i) for i in of)

    assert low <= num_found / num_asked <= high
    if num_found > 0:
        assert probability(range(num_found, num_asked + 1), low) == pytest.approx(0.025, rel=1e-6)
    if num_found < num_asked:
        assert probability(range(num_found + 1), high) == pytest.approx(0.025, rel=1e-6)


def test_an_interval_of_nothing_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="num_found=2 must be between 0 and num_asked=1"):
        clopper_pearson(2, 1)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [2048, 3000])
def test_facts_stand_between_paragraphs_at_even_depths(
    corpus: Corpus, encode: Callable[[str], NDArray[np.int64]], count: int, num_tokens: int
) -> None:
    planted, end = facts(count, 1), 60_000
    paper = exam(corpus, planted, encode, end=end, num_tokens=num_tokens, num_continued=NUM_CONTINUED)
    assert len(paper.prompt_N) + len(paper.continuation_N) == num_tokens
    assert np.array_equal(paper.continuation_N, corpus.token_ids_N[end - NUM_CONTINUED : end])
    longest = max(np.diff((0, *corpus.ends)))
    rest, removed = paper.prompt_N, 0
    for number, (fact, start) in enumerate(zip(planted, paper.starts, strict=True)):
        sentence = encode(fact.sentence)
        assert np.array_equal(paper.prompt_N[start : start + len(sentence)], sentence)
        rest = np.delete(rest, np.s_[start - removed : start - removed + len(sentence)])
        depth = number / max(1, count - 1)
        room = num_tokens - NUM_CONTINUED - sum(len(encode(each.sentence)) for each in planted)
        assert abs(start - removed - depth * room) <= longest
        # A paragraph ends before each fact: at this place of the corpus.
        assert end - NUM_CONTINUED - room + start - removed in corpus.ends
        removed += len(sentence)
    assert np.array_equal(rest, corpus.token_ids_N[end - NUM_CONTINUED - len(rest) : end - NUM_CONTINUED])


def test_every_fact_is_of_another_place_and_depends_on_the_seed_alone() -> None:
    planted = facts(len(PLACES), 3)
    assert len({fact.place for fact in planted}) == len({fact.number for fact in planted}) == len(PLACES)
    assert planted == facts(len(PLACES), 3) != facts(len(PLACES), 4)
    with pytest.raises(ValueError, match="count=21 facts must be between 1 and 20"):
        facts(21, 0)


def test_a_text_that_the_corpus_has_not_is_refused(corpus: Corpus, encode: Callable[[str], NDArray[np.int64]]) -> None:
    with pytest.raises(ValueError, match="num_tokens=3000 up to 2000 with 1 facts is no part of"):
        exam(corpus, facts(1, 0), encode, end=2000, num_tokens=3000, num_continued=NUM_CONTINUED)


def test_pythons_own_text_has_no_paragraph_twice() -> None:
    parts = paragraphs()
    assert len(parts) == len(set(parts))
    assert sum(map(len, parts)) > 300_000


def test_each_baseline_comes_before_what_is_compared_with_it() -> None:
    planned = list(cells([32768, 8192, 2048], num_texts=2, max_context=8192))
    assert len(set(planned)) == len(planned)
    for place, cell in enumerate(planned):
        assert cell.baseline in planned[: place + 1]
    assert {cell.num_tokens for cell in planned if cell.is_stretched} == {8192, 32768}
    assert all(cell.budget.leaves_out(cell.num_prompt_tokens) for cell in planned)
    assert Cell(num_tokens=2048, text=1, budget=Budget(kind="keys", size=1024)) not in planned


@torch.inference_mode()
def oracle_logits(checkpoint: Checkpoint, token_ids_N: NDArray[np.int64]) -> tolerance.Expected:
    """Chain 1's, by the plain model over the whole text at once."""
    model, config = checkpoint.load(1, dtype=torch.float64), checkpoint.config
    logits_BTV: Tensor = model(torch.from_numpy(token_ids_N).unsqueeze(0), 1)
    return tolerance.layers(logits_BTV[0], torch.float32, num_layers=config.num_layers, width=config.chain_dims[0])


def assert_blocks_are_the_oracles(
    outcome: Outcome, checkpoint: Checkpoint, corpus: Corpus, encode: Callable[[str], NDArray[np.int64]]
) -> None:
    paper = exam(
        corpus,
        facts(3, 0),
        encode,
        end=len(corpus.token_ids_N),
        num_tokens=NUM_TOKENS,
        num_continued=NUM_CONTINUED,
    )
    text_N = np.concatenate([paper.prompt_N, paper.continuation_N])
    expected = oracle_logits(checkpoint, text_N[:-1])
    exact = negative_log_likelihoods(expected.exact, torch.from_numpy(text_N[1:]))[-NUM_SCORED:]
    wanted = exact.view(NUM_BLOCKS, -1).mean(dim=1)
    # A log-likelihood moves by no more than twice what the logits move by.
    allowed = 2 * expected.allowed.amax(dim=1)[-NUM_SCORED:].view(NUM_BLOCKS, -1).mean(dim=1)
    tolerance.Expected(wanted, allowed, torch.float64).check(torch.tensor(outcome.nll_blocks, dtype=torch.float64))


def test_a_dense_cell_reads_the_last_tokens_as_the_whole_model_does(
    experiment: Experiment, checkpoint: Checkpoint, corpus: Corpus, encode: Callable[[str], NDArray[np.int64]]
) -> None:
    outcome = experiment.run(DENSE)
    assert (outcome.density, outcome.num_dense_layers, len(outcome.found)) == (1.0, 1, 3)
    assert_blocks_are_the_oracles(outcome, checkpoint, corpus, encode)


def test_a_stretched_cell_is_of_the_model_with_yarn(
    experiment: Experiment, checkpoint: Checkpoint, corpus: Corpus, encode: Callable[[str], NDArray[np.int64]]
) -> None:
    yarn = RopeScaling(kind="yarn", factor=4.0, original_max_context=CONTEXT)
    stretched = replace(checkpoint, config=replace(checkpoint.config, rope_scaling=yarn))
    outcome = experiment.run(replace(DENSE, is_stretched=True))
    assert_blocks_are_the_oracles(outcome, stretched, corpus, encode)


def test_sparse_attention_leaves_out_what_its_density_says_and_the_audit_puts_it_back(experiment: Experiment) -> None:
    """In so short a prompt the audit may look at fewer than two rows, so everything is dense and nothing changes."""
    dense, sparse = experiment.run(DENSE), experiment.run(KEYS)
    audited = experiment.run(replace(KEYS, is_audited=True))
    assert sparse.density < 0.9
    assert sparse.num_dense_layers == 0
    assert sparse.nll_blocks != dense.nll_blocks
    assert audited == dense


def test_an_answer_is_right_if_greedy_decoding_gives_it(checkpoint: Checkpoint, corpus: Corpus) -> None:
    kv_format = KvFormat.of(checkpoint.config, torch.float32)
    prompt_N, question_T = corpus.token_ids_N[:100], corpus.token_ids_N[500:521]
    reading = Reading(checkpoint, kv_format, num_tokens=100, max_text_tokens=40)
    for tile in PrefillEngine(checkpoint, kv_format, tile_tokens=64).run(prompt_N):
        reading.write(tile)
    text_N = np.concatenate([prompt_N, question_T])
    for _ in range(4):
        following = oracle_logits(checkpoint, text_N).exact[-1].argmax()
        text_N = np.append(text_N, int(following))
    answer_T = text_N[-4:]
    assert reading.is_answered(question_T, answer_T)
    for place in range(4):
        wrong_T = answer_T.copy()
        wrong_T[place] = (wrong_T[place] + 1) % 300
        assert not reading.is_answered(question_T, wrong_T)
    assert reading.is_answered(question_T, answer_T)  # whatever was read in between


OUTCOME = Outcome(nll_blocks=(1.25, 2.5), found=(True, False), density=0.25, num_dense_layers=3)


def test_outcomes_come_back_from_their_file_and_only_those_of_the_same_setting(tmp_path: Path) -> None:
    path = tmp_path / "results" / "quality.jsonl"
    records = Records(path, {"seed": 0}, Cell, Outcome)
    for cell in (DENSE, KEYS):
        records.add(cell, OUTCOME, {"commit": "c"})
    again = Records(path, {"seed": 0}, Cell, Outcome)
    assert again.outcomes == {DENSE: OUTCOME, KEYS: OUTCOME}
    assert again.environments == [{"commit": "c"}] * 2
    assert Records(path, {"seed": 1}, Cell, Outcome).outcomes == {}


def test_rows_put_texts_together_and_leave_out_what_has_no_baseline() -> None:
    worse = replace(OUTCOME, nll_blocks=(1.35, 2.6), found=(False, False))
    other = replace(KEYS, text=1)
    dense, sparse = rows({DENSE: OUTCOME, KEYS: worse, other: worse})
    assert (dense.over_dense, dense.num_found, dense.num_asked) == (None, 1, 2)
    assert (sparse.num_texts, sparse.num_found) == (1, 0)
    assert sparse.over_dense is not None
    assert sparse.over_dense.value == pytest.approx(math.exp(0.1))
    both = rows({DENSE: OUTCOME, KEYS: worse, other.baseline: OUTCOME, other: OUTCOME})
    assert [(row.num_texts, row.num_found, row.num_asked) for row in both] == [(2, 2, 4), (2, 1, 4)]


def test_rows_stand_in_one_order_whatever_ran_first() -> None:
    longer, audited = replace(DENSE, num_tokens=4096), replace(KEYS, is_audited=True)
    shares = [replace(DENSE, budget=Budget(kind="mass", size=share)) for share in (0.8, 0.9)]
    ordered = [DENSE, *shares, KEYS, audited, longer, replace(DENSE, is_stretched=True)]
    found = rows(dict.fromkeys(reversed(ordered), OUTCOME))
    keys = [(row.num_tokens, row.budget, row.is_audited, row.is_stretched) for row in found]
    assert keys == [(cell.num_tokens, cell.budget, cell.is_audited, cell.is_stretched) for cell in ordered]


def test_the_table_replaces_what_is_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_table(page, rows({DENSE: OUTCOME}), "the source")
    once = page.read_text(encoding="utf-8")
    assert once.startswith(f"before\n{BEGIN}\n| text |")
    assert "| 2K | dense |  | 0.250 | 6.521 | 1 | 1 of 2 | 0.01 to 0.99 |\n\nthe source\n" in once
    assert once.endswith(f"{END}\nafter\n")
    write_table(page, rows({DENSE: OUTCOME}), "the source")
    assert page.read_text(encoding="utf-8") == once
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no place for the table"):
        write_table(page, [], "")


def test_the_plot_has_a_column_for_each_length(tmp_path: Path) -> None:
    from bench.quality.plot import write_plot

    audited = replace(KEYS, is_audited=True)
    path = tmp_path / "plots" / "quality.png"
    write_plot(path, rows({DENSE: OUTCOME, KEYS: OUTCOME, audited: OUTCOME}), "the source")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command_runs_what_the_record_has_not(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "paragraphs", lambda: PARTS)
    words = ["--model", str(checkpoint.path), "--record", str(tmp_path / "q.jsonl"), "--facts", "2", "--lengths", "2K"]
    words += ["--attention", "keys 512", "--dtype", "float32", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench.quality", *words])
    command.main()
    out, err = capsys.readouterr()
    assert err == "1/2 2K, text 0, dense\n2/2 2K, text 0, keys 512\n"
    record = json.loads(out.splitlines()[-1])
    assert [row["attention"] for row in record["rows"]] == ["dense", "keys 512"]
    command.main()
    again, err = capsys.readouterr()
    assert err == ""
    assert json.loads(again.splitlines()[-1])["rows"] == record["rows"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attention", "mass 0.95,keys 1000"], "'keys 1000' is unknown; use some of mass 0.8, mass 0.9,"),
        (["--lengths", "2K,8k"], "length '8k' is not one; write e.g. 2K, 1M or 1000"),
    ],
)
def test_options_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.quality", *words])
    with pytest.raises(SystemExit):
        command.main()
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_length_beyond_the_stretched_context_is_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.quality", "--model", str(checkpoint.path), "--lengths", "2K,32K"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--lengths: 32K is beyond the stretched context, 16K" in capsys.readouterr().err
