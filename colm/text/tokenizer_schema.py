"""What a tokenizer.json may hold: kinds, sizes and costs, checked before the library in Rust sees it.

A tokenizer is a program: its regular expressions may take for ever, its replacements may fill memory, and the library
ends the process where a table does not fit. Only what published models use is let through.
"""

import base64
import binascii
import json
import reprlib
import resource
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from colm.text.regex_cost import cost_of

MAX_TOKEN_CHARS: Final = 1024
"""Windows of a text overlap by several tokens."""
_MAX_TOKEN_ID: Final = 1 << 20
MAX_ENTRIES: Final = 1 << 19
_MAX_MERGES: Final = 1 << 20
_MAX_ADDED: Final = 1 << 17
_MAX_CHARS: Final = {"BPE": 1 << 22, "Unigram": 1 << 21, "added_tokens": 1 << 20}
"""Of all tokens together. The library makes a node of a tree for each of Unigram's."""
_MAX_SCORE: Final = 1e9
_MAX_STEPS: Final = 16
_MAX_UNICODE_STEPS: Final = 2
_MAX_GROWTH: Final = 16
"""Bytes that the steps may make of one."""
_MAX_NORMALIZED_BYTES: Final = 64
"""Of one character. Unicode's longest takes 33."""

_UNICODE: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"})
_KINDS: Final = {
    "normalizer": _UNICODE
    | {"BertNormalizer", "ByteLevel", "Lowercase", "Prepend", "Replace", "Sequence", "Strip", "StripAccents"},
    "pre_tokenizer": frozenset(
        {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence"}
        | {"Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
    ),
    "post_processor": frozenset({"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"}),
    "decoder": frozenset(
        {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}
        | {"WordPiece"}
    ),
}
_Word = Annotated[str, Field(max_length=64)]
_Few = Annotated[list[Any], Field(max_length=64)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Pattern(_Part):
    String: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    Regex: str | None = None


class _SpecialToken(_Part):
    ids: _Few
    tokens: _Few


class _Step(_Part):
    """Any step of text into tokens or back: the fields that its cost depends on. The library checks the others."""

    type: _Word
    pattern: _Pattern | None = None
    content: _Word = ""
    prepend: _Word = ""
    replacement: _Word = ""
    precompiled_charsmap: str | None = None
    single: _Few | None = None
    pair: _Few | None = None
    special_tokens: Annotated[dict[str, _SpecialToken], Field(max_length=64)] | None = None
    steps: "Annotated[list[_Step], Field(max_length=_MAX_STEPS)]" = Field(
        default=[], validation_alias=AliasChoices("normalizers", "pretokenizers", "processors", "decoders")
    )

    def flat(self) -> "Iterator[_Step]":
        """The step itself, or those that it is a sequence of."""
        if self.type != "Sequence":
            yield self
        for step in self.steps:
            yield from step.flat()


class _AddedToken(_Part):
    id: Annotated[int, Field(ge=0, lt=_MAX_TOKEN_ID)]
    content: Annotated[str, Field(min_length=1, max_length=MAX_TOKEN_CHARS)]


class _Model(_Part):
    type: Literal["BPE", "Unigram"]
    dropout: Annotated[float, Field(ge=0, le=0)] | None = None
    vocab: Any
    merges: Any = ()


class _File(_Part):
    added_tokens: Annotated[list[_AddedToken], Field(max_length=_MAX_ADDED)] | None = None
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    post_processor: _Step | None = None
    decoder: _Step | None = None
    model: _Model


def check_tokenizer(data: bytes) -> bool:
    """Check a tokenizer.json.

    Returns:
        Whether no regular expression takes time for the square of a text's length. Those of some published models do.

    Raises:
        ValueError: names the field that is wrong.
    """
    try:
        body = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
        if not isinstance(body, dict):
            raise ValueError(f"it holds {type(body).__name__}, not an object")
        file = _File.model_validate(body)
    except RecursionError as err:
        raise ValueError("it is nested too deeply") from err
    except ValidationError as err:
        found = err.errors(include_url=False)[0]
        field = ".".join(map(str, found["loc"]))
        raise ValueError(f"{field}={reprlib.repr(found['input'])}: {found['msg']}") from err
    _check_chars("added_tokens", [token.content for token in file.added_tokens or ()], _MAX_CHARS["added_tokens"])
    _check_vocabulary(file.model)
    degree, growth, num_unicode_steps = 0, 1.0, 0
    for place, kinds in _KINDS.items():
        step: _Step | None = getattr(file, place)
        flat = [] if step is None else list(step.flat())
        if len(flat) > _MAX_STEPS:
            raise ValueError(f"{place} has {len(flat)} steps, at most {_MAX_STEPS} are let through")
        for step in flat:
            if step.type not in kinds:
                raise ValueError(f"{place}.type={step.type!r} is not known; known are {', '.join(sorted(kinds))}")
            if step.pattern is not None and step.pattern.Regex is not None:
                degree = max(degree, _degree(place, step.pattern.Regex))
            if place in ("normalizer", "pre_tokenizer"):
                growth *= _growth(step)
                num_unicode_steps += step.type in _UNICODE
    if growth > _MAX_GROWTH or num_unicode_steps > _MAX_UNICODE_STEPS:
        raise ValueError(
            f"normalizer and pre_tokenizer may make {growth:g} bytes of one, with {num_unicode_steps} Unicode forms; "
            f"at most {_MAX_GROWTH} and {_MAX_UNICODE_STEPS} are let through"
        )
    return degree == 0


def _degree(place: str, regex: str) -> int:
    try:
        return cost_of(regex).degree
    except ValueError as err:
        raise ValueError(f"{place}.pattern.Regex: {err}") from err


def _check_vocabulary(model: _Model) -> None:
    vocab = model.vocab
    if model.type == "BPE":
        _check_kind("model.vocab", vocab, dict, MAX_ENTRIES)
        tokens, ids = list(vocab), vocab.values()
        if set(map(type, ids)) - {int} or not 0 <= min(ids, default=0) <= max(ids, default=0) < _MAX_TOKEN_ID:
            raise ValueError(f"model.vocab must have a token id of 0 or more, below {_MAX_TOKEN_ID}, for each token")
    else:
        _check_kind("model.vocab", vocab, list, MAX_ENTRIES)
        if not all(isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is str for entry in vocab):
            raise ValueError("model.vocab must be a list of [token, score]")
        if not all(type(score) in (int, float) and abs(score) <= _MAX_SCORE for _, score in vocab):
            raise ValueError("model.vocab has a score that is no finite number")
        tokens = [token for token, _ in vocab]
    _check_chars("model.vocab", tokens, _MAX_CHARS[model.type])
    _check_kind("model.merges", model.merges or [], list, _MAX_MERGES)


def _check_kind(field: str, value: Any, kind: type[list[Any]] | type[dict[str, Any]], limit: int) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{field} is {type(value).__name__}, not {kind.__name__}")
    if len(value) > limit:
        raise ValueError(f"{field} has {len(value)} entries, at most {limit} are read")


def _check_chars(field: str, tokens: list[str], limit: int) -> None:
    if max(map(len, tokens), default=0) > MAX_TOKEN_CHARS:
        raise ValueError(f"{field} has a token of more than {MAX_TOKEN_CHARS} characters")
    if sum(map(len, tokens)) > limit:
        raise ValueError(f"{field} has tokens of more than {limit} characters together")


def _growth(step: _Step) -> float:
    """The most bytes that a step makes of one. Unicode's own forms are counted apart."""
    match step.type:
        case "Precompiled":
            _check_charsmap(step.precompiled_charsmap or "")
            return 1
        case "ByteLevel" | "BertNormalizer":
            return 2
        case "Lowercase":
            return 1.5
        case "Prepend":
            return 1 + _num_bytes(step.prepend)
        case "Metaspace":
            return 1 + _num_bytes(step.replacement)
        case "Replace":
            # A regular expression may match between all characters.
            text = step.pattern.String if step.pattern is not None else None
            return max(1.0, _num_bytes(step.content) / _num_bytes(text)) if text else 1 + _num_bytes(step.content)
    return 1


def _check_charsmap(written: str) -> None:
    """SentencePiece's own normalizer: a table of 32-bit numbers, behind it the texts that they stand for."""
    try:
        data = base64.b64decode(written, validate=True)
    except binascii.Error as err:
        raise ValueError(f"normalizer.precompiled_charsmap is not base64: {err}") from err
    num_bytes = int.from_bytes(data[:4], "little")
    texts = data[4 + num_bytes :]
    if num_bytes % 4 or not texts.endswith(b"\0") or max(map(len, texts.split(b"\0"))) > _MAX_NORMALIZED_BYTES:
        raise ValueError("normalizer.precompiled_charsmap is damaged")


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The two readers of the file could differ in which of two values they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a field or a token twice")
    return found


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def main() -> None:
    """Check what stdin holds, as a process of its own with limits, and answer in JSON on stdout."""
    cpu_s, memory_bytes = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer: dict[str, object] = {"is_linear": check_tokenizer(sys.stdin.buffer.read())}
    except ValueError as err:
        answer = {"problem": str(err)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
