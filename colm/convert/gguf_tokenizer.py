"""The tokenizer that a GGUF file describes in its metadata, as a Hugging Face tokenizer.json."""

import math
import warnings
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from colm.checkpoint import TextConfig
from colm.errors import CheckpointError
from colm.text.tokenizer_file import check, reading
from colm.text.tokenizer_schema import MAX_ENTRIES, MAX_TOKEN_CHARS

_T = TypeVar("_T")

GPT2_PRE = ("gpt-2", "default")
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
SMOLLM_PRE = ("smollm",)

# How LLaMA 3 cuts text into words: contractions, letters, up to three digits, punctuation, line ends, spaces.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"
"""Stands for a space in SentencePiece vocabularies."""


_MAX_CUT_CHARS = 1 << 26
"""A token is cut at each of its characters to find what it is made of: the sum of their lengths' squares."""


class MetadataSource(Protocol):
    """The metadata of a GGUF file."""

    @property
    def path(self) -> Path:
        """What warnings call the source."""

    def metadata(self, key: str) -> Any:
        """Value of a key as plain Python; None where the file lacks it."""


class _TokenType(IntEnum):
    """The kinds of GGUF vocabulary entries that matter here."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


class _UnknownTokenizer(Exception):
    """The metadata describes no tokenizer that can be built; the message says why."""


def text_from_gguf(file: MetadataSource) -> tuple[bytes | None, TextConfig]:
    """Read the tokenizer and the text conventions of a GGUF file.

    Returns:
        Contents of tokenizer.json and the conventions. The first is None, with a warning that names the
        reason, where the tokenizer is of a kind that is not known here; the model then serves token ids only.

    Raises:
        CheckpointError: a value is not of the kind that its key has.
    """
    try:
        return _read_text(file)
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"{file.path}: tokenizer.{err}; convert the model again") from err


def _read_text(file: MetadataSource) -> tuple[bytes | None, TextConfig]:
    bos_id = file.metadata("tokenizer.ggml.bos_token_id")
    ends = [file.metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
    try:
        tokenizer_json = str(_tokenizer(file).to_str()).encode()
        check(tokenizer_json)
    except _UnknownTokenizer as err:
        warnings.warn(
            f"{file.path}: {err}: the checkpoint serves token ids only; put the model's tokenizer.json into "
            "it to serve text",
            stacklevel=4,
        )
        return None, TextConfig(bos_token_id=bos_id, eos_token_ids=eos_ids)
    add_bos = file.metadata("tokenizer.ggml.add_bos_token")
    if add_bos is None:
        # What llama.cpp assumes where the file is silent.
        add_bos = file.metadata("tokenizer.ggml.model") == "llama" or _pre(file) in LLAMA3_PRE
    text = TextConfig(
        bos_token_id=bos_id,
        eos_token_ids=eos_ids,
        add_bos=bool(add_bos) and bos_id is not None,
        chat_template=file.metadata("tokenizer.chat_template"),
    )
    return tokenizer_json, text


def _pre(file: MetadataSource) -> str:
    return str(file.metadata("tokenizer.ggml.pre") or "default")


def _tokenizer(file: MetadataSource) -> Tokenizer:
    model = file.metadata("tokenizer.ggml.model")
    tokens = _list(file, "tokenizer.ggml.tokens", str)
    types = _list(file, "tokenizer.ggml.token_type", int) or [_TokenType.NORMAL] * len(tokens)
    if len(tokens) > MAX_ENTRIES or max(map(len, tokens), default=0) > MAX_TOKEN_CHARS:
        raise _UnknownTokenizer(
            f"tokenizer.ggml.tokens holds over {MAX_ENTRIES} tokens, or one of more than {MAX_TOKEN_CHARS} characters"
        )
    if sum(len(token) ** 2 for token in tokens) > _MAX_CUT_CHARS:
        raise _UnknownTokenizer("tokenizer.ggml.tokens holds too many long tokens")
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise _UnknownTokenizer("tokenizer.ggml.tokens holds a token twice, or not one for each token_type")
    if model == "gpt2":
        if _pre(file) not in (*GPT2_PRE, *LLAMA3_PRE, *SMOLLM_PRE):
            raise _UnknownTokenizer(f"tokenizer.ggml.pre={_pre(file)!r} is unknown")
        tokenizer = _byte_level(tokens, _list(file, "tokenizer.ggml.merges", str), _pre(file))
    elif model == "llama":
        scores = _list(file, "tokenizer.ggml.scores", float)
        if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
            raise _UnknownTokenizer("tokenizer.ggml.scores does not hold one finite score for each token")
        add_prefix = file.metadata("tokenizer.ggml.add_space_prefix")
        unknown_id = file.metadata("tokenizer.ggml.unknown_token_id") or 0
        if not isinstance(unknown_id, int) or not 0 <= unknown_id < len(tokens):
            raise _UnknownTokenizer(f"tokenizer.ggml.unknown_token_id={unknown_id!r:.80} is no token's")
        unknown = tokens[unknown_id]
        tokenizer = _sentencepiece(tokens, types, scores, unknown, add_prefix=add_prefix is not False)
    else:
        raise _UnknownTokenizer(f"tokenizer.ggml.model={model!r} is unknown")
    for special, kinds in (
        (True, (_TokenType.CONTROL, _TokenType.UNKNOWN)),
        (False, (_TokenType.USER_DEFINED,)),
    ):
        added = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    return tokenizer


def _list(file: MetadataSource, key: str, kind: type[_T]) -> list[_T]:
    found = file.metadata(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(type(entry) is kind for entry in found):
        raise _UnknownTokenizer(f"{key} is no list of {kind.__name__}")
    return found


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: str) -> Tokenizer:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    for merge in merges:
        if merge.replace(" ", "") not in vocab:
            raise _UnknownTokenizer(f"tokenizer.ggml.merges: {merge!r} makes no token")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    llama3 = pre in LLAMA3_PRE
    tokenizer = Tokenizer(_bpe(vocab=vocab, merges=pairs, fuse_unk=False, ignore_merges=llama3))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    if llama3:
        cut = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, words])
    elif pre in SMOLLM_PRE:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    else:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(**parts: Any) -> Any:
    try:
        return reading(lambda: models.BPE(**parts))
    except CheckpointError as err:
        raise _UnknownTokenizer(f"tokenizer.ggml.tokens and tokenizer.ggml.merges do not fit: {err.__cause__}") from err


def _sentencepiece(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], unknown: str, *, add_prefix: bool
) -> Tokenizer:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    model = _bpe(
        vocab=vocab,
        merges=_merges_by_score(tokens, types, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    mark_spaces = normalizers.Replace(" ", SPACE)
    prefixed = normalizers.Sequence([normalizers.Prepend(SPACE), mark_spaces])
    tokenizer.normalizer = prefixed if add_prefix else mark_spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
    return tokenizer


def _merges_by_score(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merge list for SentencePiece's rule: join the neighbours whose union scores highest."""
    ranked = sorted(zip(tokens, types, scores, strict=True), key=lambda entry: -entry[2])
    pieces = {token: None for token, kind, _ in ranked if kind == _TokenType.NORMAL}
    return [
        (token[:cut], token[cut:])
        for token in pieces
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
