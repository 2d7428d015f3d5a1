"""Pieces have the whole text's ids, need one window's memory, and refuse a text that cannot be cut."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from colm.checkpoint import Checkpoint
from colm.errors import InvalidRequest
from colm.text.pieces import MAX_WINDOW_CHARS, PieceEncoder
from tests.encoders import BACKTRACKING, FAMILIES, llama3, metaspace, with_words
from tests.unit.test_tokenizer import TEXTS

ROOT = Path(__file__).parents[2]
RUNS = ["1", "4444", "12345678901234567890", " ", "\n\n", "a", "the ", "=", "\t", "e\u0301", "<|im_end|>", "ab", "ж"]
MIXED = st.lists(st.sampled_from(TEXTS) | st.builds(str.__mul__, st.sampled_from(RUNS), st.integers(1, 400)))


def pieces(encoder: PieceEncoder, text: str) -> list[list[int]]:
    return [piece.tolist() for piece in encoder.pieces(text)]


def end_to_end(found: list[list[int]]) -> list[int]:
    return [token_id for piece in found for token_id in piece]


def whole(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def small(encoder: tokenizers.Tokenizer) -> PieceEncoder:
    """An encoder with windows as small as its tokens allow, so that a short text has many."""
    longest = max(map(len, encoder.get_vocab(with_added_tokens=True)))
    return PieceEncoder(encoder, window_chars=64 * longest + 1, overlap_chars=0)


def shuffled(seed: int, num_chars: int) -> str:
    generator = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < num_chars:
        run = generator.choice(RUNS) * generator.randint(1, 60)
        parts.append(generator.choice([*TEXTS, run]))
    return "".join(parts)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(parts=MIXED, repeats=st.integers(1, 4))
def test_pieces_are_the_whole(family: str, parts: list[str], repeats: int) -> None:
    encoder, text = FAMILIES[family], "".join(parts) * repeats
    assert end_to_end(pieces(small(encoder), text)) == whole(encoder, text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_long_texts_are_cut_many_times_and_are_the_whole(family: str, seed: int) -> None:
    encoder, text = FAMILIES[family], shuffled(seed, 30_000)
    found = pieces(small(encoder), text)
    assert len(found) > 10
    assert end_to_end(found) == whole(encoder, text)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_a_real_tokenizer_are_the_whole(smollm2_checkpoint: Checkpoint, seed: int) -> None:
    encoder = tokenizers.Tokenizer.from_file(str(smollm2_checkpoint.tokenizer_path))
    text = shuffled(seed, 300_000)
    for chosen, at_least in ((small(encoder), 40), (PieceEncoder(encoder), 4)):
        found = pieces(chosen, text)
        assert len(found) >= at_least
        assert end_to_end(found) == whole(encoder, text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_chars", [0, 1, 4096, 65_536, 65_537, 65_538, 131_074, 131_075])
def test_texts_about_as_long_as_a_window_are_the_whole(family: str, num_chars: int) -> None:
    encoder, text = FAMILIES[family], shuffled(num_chars, num_chars)[:num_chars]
    assert end_to_end(pieces(PieceEncoder(encoder), text)) == whole(encoder, text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", [*RUNS, "日本語", "ACGT"])
def test_one_endless_run_between_words_is_the_whole(family: str, run: str) -> None:
    encoder, text = FAMILIES[family], "the end " * 300 + run * (20_000 // len(run)) + " and the rest" * 300
    assert end_to_end(pieces(small(encoder), text)) == whole(encoder, text)


def test_a_window_grows_over_a_token_that_is_longer() -> None:
    """One token has no longest text in a vocabulary that makes a run of unknown characters one token."""
    encoder = metaspace("always", fuse_unk=True)
    text = "the end " * 20_000 + "ж" * 300_000 + " and the rest" * 20_000
    found = pieces(PieceEncoder(encoder), text)
    assert len(found) == 4
    assert end_to_end(found) == whole(encoder, text)


def test_a_text_without_a_place_to_cut_is_refused() -> None:
    """Bug: the whole text was held in memory, at hundreds of bytes a character."""
    text = "the end " + "ж" * (MAX_WINDOW_CHARS + 70_000)
    with pytest.raises(InvalidRequest, match=r"document='the end жж.*no place to cut"):
        pieces(PieceEncoder(metaspace("always", fuse_unk=True)), text)


def test_a_panic_of_the_tokenizer_is_an_invalid_document() -> None:
    """Bug: a panic is a BaseException, and the call was never answered."""
    encoder = PieceEncoder(with_words(BACKTRACKING))
    with pytest.raises(InvalidRequest, match=r"document=.*cannot read it.*retry-limit") as refusal:
        pieces(encoder, "so " + "a" * 30)
    assert refusal.value.field == "document"
    assert end_to_end(pieces(encoder, "aab")) == whole(with_words(BACKTRACKING), "aab")


def test_spaces_that_make_llama_3_panic_are_read_in_pieces() -> None:
    """Twelve million spaces fit a context of 128K tokens, and are too much for the regex at once."""
    num_spaces = 12_000_000
    ids = end_to_end(pieces(PieceEncoder(llama3(num_doublings=7)), " " * num_spaces))
    assert ids == whole(llama3(num_doublings=7), " " * 128) * (num_spaces // 128)


def test_a_long_text_costs_the_memory_of_a_window() -> None:
    """Bug: two million digits took 291 MiB at once."""
    code = (
        "import resource;from colm.text.pieces import PieceEncoder;from tests.tiny import tiny_tokenizer\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "encoder, digits = PieceEncoder(tiny_tokenizer()), '0123456789' * 200_000\n"
        "next(encoder.pieces(digits)); before = peak()\n"
        "for _ in encoder.pieces(digits): pass\n"
        "import sys; sys.stdout.write(str(peak() - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
