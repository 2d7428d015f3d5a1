"""No token stands for more bytes than the bound; a tokenizer with unlimited tokens has no bound."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from colm.checkpoint import Checkpoint
from colm.text.bound import TokenBound
from colm.text.detokenizer import SENTENCEPIECE_SPACE
from colm.text.tokenizer import Tokenizer
from tests.encoders import FAMILIES, llama3, metaspace, sentencepiece
from tests.tiny import SPECIAL_TOKENS, tiny_checkpoint, tiny_tokenizer

BOUNDED = {name: encoder for name, encoder in FAMILIES.items() if name not in ("normalizing", "unknown runs")}
LONGEST_SPECIAL = max(map(len, SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def smollm2(smollm2_checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = Tokenizer.load(smollm2_checkpoint)
    assert tokenizer is not None
    return tokenizer


def changed(encoder: tokenizers.Tokenizer, **parts: Any) -> tokenizers.Tokenizer:
    for name, part in parts.items():
        setattr(encoder, name, part)
    return encoder


def with_added(encoder: tokenizers.Tokenizer, content: str, **flags: bool) -> tokenizers.Tokenizer:
    encoder.add_tokens([AddedToken(content, **flags)])
    return encoder


def brute_force(tokenizer: Tokenizer) -> int:
    """The longest token, found by decoding each."""
    stand_for = (tokenizer.decode([token_id], skip_special=False) for token_id in range(tokenizer.vocab_size))
    return max(len(text.encode()) for text in stand_for if "\ufffd" not in text)


def test_the_bound_is_the_longest_token(tmp_path: Path, smollm2: Tokenizer) -> None:
    tiny = Tokenizer.load(tiny_checkpoint(tmp_path, tokenizer=True))
    assert tiny is not None
    for tokenizer in (tiny, smollm2):
        assert tokenizer.bound is not None
        assert tokenizer.bound.max_token_bytes == brute_force(tokenizer)


@pytest.mark.parametrize("family", BOUNDED)
@given(parts=st.lists(st.text() | st.sampled_from(["the ", " and ", "    " * 20, "▁▁▁▁", "<0x0A>", "ж" * 30, "ing"])))
def test_no_text_has_fewer_tokens(family: str, parts: list[str]) -> None:
    encoder, text = BOUNDED[family], "".join(parts)
    bound = TokenBound.of(encoder)
    assert bound is not None
    assert not bound.passed_over
    assert len(text.encode()) <= bound.max_token_bytes * len(encoder.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("encoder", "bound"),
    [
        (tiny_tokenizer(), LONGEST_SPECIAL),
        (llama3(num_doublings=7), 128),
        (sentencepiece(), 2 * len(SENTENCEPIECE_SPACE.encode())),
        (metaspace("first"), LONGEST_SPECIAL),
        (with_added(tiny_tokenizer(), "ж" * 20), 40),
        (with_added(sentencepiece(), "a b" * 20, normalized=True), 100 + len(SENTENCEPIECE_SPACE.encode())),
    ],
    ids=["byte level", "runs of spaces", "marked spaces", "unknown characters", "added token", "added, normalized"],
)
def test_a_character_counts_as_the_bytes_it_stands_for(encoder: tokenizers.Tokenizer, bound: int) -> None:
    assert TokenBound.of(encoder) == TokenBound(max_token_bytes=bound)


def test_the_longest_run_of_literal_marks_is_within_the_bound() -> None:
    """A document may hold the very character that marks a space, three bytes long."""
    ids = sentencepiece().encode(SENTENCEPIECE_SPACE * 99, add_special_tokens=False).ids
    assert len(ids) * 6 >= 3 * 99 > len(ids) * 2


@given(text=st.text(st.sampled_from("\x04\x06\U00040000 ab\n")))
def test_bytes_that_the_vocabulary_lacks_do_not_count(smollm2: Tokenizer, text: str) -> None:
    """SmolLM2's vocabulary lacks some control characters and the first byte of most characters beyond emoji."""
    assert smollm2.bound is not None
    assert {4, 6, 0xF1} <= set(smollm2.bound.passed_over)
    known = text.encode().translate(None, smollm2.bound.passed_over)
    assert len(known) <= smollm2.bound.max_token_bytes * len(smollm2.encode(text))


@pytest.mark.parametrize(
    "encoder",
    [
        changed(tiny_tokenizer(), normalizer=normalizers.NFC()),
        changed(tiny_tokenizer(), normalizer=normalizers.Sequence([normalizers.Prepend("a"), normalizers.Strip()])),
        changed(tiny_tokenizer(), normalizer=normalizers.Replace("  ", " ")),
        changed(tiny_tokenizer(), normalizer=normalizers.Replace(tokenizers.Regex(" +"), "▁")),
        changed(tiny_tokenizer(), pre_tokenizer=pre_tokenizers.Whitespace()),
        changed(tiny_tokenizer(), pre_tokenizer=pre_tokenizers.Split(" ", behavior="removed")),
        with_added(tiny_tokenizer(), "tag", lstrip=True),
        with_added(tiny_tokenizer(), "tag", rstrip=True),
        metaspace("first", fuse_unk=True),
        changed(sentencepiece(), model=models.BPE(vocab={"a": 0}, merges=[])),
        changed(tiny_tokenizer(), model=models.BPE(vocab={"a": 0}, merges=[], unk_token="a", fuse_unk=True)),
        changed(tiny_tokenizer(), model=models.WordLevel(vocab={"a": 0}, unk_token="a")),
        changed(sentencepiece(), model=models.Unigram([("a", 0.0)], 0, False)),
    ],
    ids=lambda encoder: type(encoder.model).__name__,
)
def test_there_is_no_bound_where_text_may_vanish(encoder: tokenizers.Tokenizer) -> None:
    assert TokenBound.of(encoder) is None
