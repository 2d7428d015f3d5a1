"""Tokenizers of every family that a checkpoint may have, all made offline."""

from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from colm.convert.gguf_tokenizer import LLAMA3_WORDS
from tests.tiny import SPECIAL_TOKENS, tiny_tokenizer

# Groups of three digits, counted from the end of the number: a cut inside a number changes all before it.
DIGITS_FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*(?!\d))"
BACKTRACKING = r"(a+)+b"
"""A regex that takes exponential time on a run of a's; two dozen of them are too many."""


def with_words(regex: str, normalizer: Any = None) -> Tokenizer:
    """The tiny tokenizer with words cut by a regex, as LLaMA 3 does."""
    encoder = tiny_tokenizer()
    cut = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([cut, words])
    encoder.normalizer = normalizer
    return encoder


def llama3(num_doublings: int = 0) -> Tokenizer:
    """LLaMA 3's words; runs of spaces up to 2^n long are tokens."""
    runs = ["Ġ" * 2**power for power in range(num_doublings + 1)]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *runs[1:]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    encoder = Tokenizer(models.BPE(vocab=vocab, merges=[(run, run) for run in runs[:-1]], ignore_merges=True))
    encoder.pre_tokenizer = with_words(LLAMA3_WORDS).pre_tokenizer
    return encoder


def metaspace(scheme: str, *, fuse_unk: bool = False) -> Tokenizer:
    """A few letters with SentencePiece's spaces. An unknown character is one token, or a run of them is."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁")]
    tokens = [*SPECIAL_TOKENS, *"▁abcdefghijklmnopqrstuvwxyz\n", *(left + right for left, right in merges)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token=SPECIAL_TOKENS[0], fuse_unk=fuse_unk)
    encoder = Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return encoder


def sentencepiece() -> Tokenizer:
    """One BPE over the whole text without words; spaces are marked, unknown characters become byte tokens."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("in", "g"), ("▁", "▁"), ("a", "a")]
    tokens = ["<unk>", *byte_tokens, *"▁abcdefghijklmnopqrstuvwxyz", *(left + right for left, right in merges)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    encoder = Tokenizer(model)
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return encoder


FAMILIES = {
    "tiny": tiny_tokenizer(),
    "llama 3": llama3(num_doublings=3),
    "digits from the right": with_words(DIGITS_FROM_THE_RIGHT),
    "normalizing": with_words(LLAMA3_WORDS, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "sentencepiece": sentencepiece(),
    "unknown runs": metaspace("always", fuse_unk=True),
    **{f"metaspace {scheme}": metaspace(scheme) for scheme in ("first", "always", "never")},
}
