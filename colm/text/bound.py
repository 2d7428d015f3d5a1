"""The most text that one token can stand for; it bounds a document's size before it is tokenised."""

import json
from dataclasses import dataclass
from typing import Any

from colm.text.detokenizer import byte_level_bytes, byte_of_character

_MAX_CHARACTER_BYTES = 4
"""Of UTF-8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBound:
    """The fewest tokens that a tokenizer can turn a text into.

    SentencePiece marks a space by a character of three bytes. Each space of a token counts as three bytes, since a
    document may hold that character itself.
    """

    max_token_bytes: int
    """The most bytes of UTF-8 that one token stands for."""
    passed_over: bytes = b""
    """Bytes that no token stands for: a byte-level vocabulary may lack some, and the tokenizer drops them."""

    @classmethod
    def of(cls, encoder: Any) -> "TokenBound | None":
        """The bound of a `tokenizers.Tokenizer` that encodes special tokens as text.

        Returns:
            None where a token may stand for any amount of text: a normalizer or pre-tokenizer may drop some, a run
            of unknown characters may become one token, or an added token takes the spaces around it.
        """
        body = json.loads(encoder.to_str())
        steps = _steps(body["normalizer"], "normalizers") + _steps(body["pre_tokenizer"], "pretokenizers")
        added = [token for token in encoder.get_added_tokens_decoder().values() if not token.special]
        if not all(map(_keeps_text, steps)) or any(token.lstrip or token.rstrip for token in added):
            return None
        model, vocab = body["model"], encoder.get_vocab(with_added_tokens=True)
        byte_level = any(step["type"] == "ByteLevel" for step in steps)
        longest = max(len(byte_level_bytes(token) if byte_level else token.encode()) for token in vocab)
        if encoder.normalizer is not None:
            normalized = (encoder.normalizer.normalize_str(token.content) for token in added)
            longest = max([longest, *(len(content.encode()) for content in normalized)])
        unknown = _unknown_bytes(model, vocab, byte_level=byte_level)
        if unknown == b"":
            return cls(max_token_bytes=longest)
        if model["type"] != "BPE" or _affixed(model):
            return None
        if model["unk_token"] in vocab and not model["fuse_unk"]:
            return cls(max_token_bytes=max(longest, _MAX_CHARACTER_BYTES))
        if model["unk_token"] is None and unknown is not None:
            return cls(max_token_bytes=longest, passed_over=unknown)
        return None


def _steps(step: Any, parts: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for part in step[parts] for inner in _steps(part, parts)] if step["type"] == "Sequence" else [step]


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a normalizer or pre-tokenizer never shortens a text."""
    match step["type"]:
        case "Prepend" | "ByteLevel" | "Metaspace" | "Digits" | "UnicodeScripts":
            return True
        case "Replace":
            pattern = step["pattern"].get("String")
            return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())
        case "Split" | "Punctuation":
            return bool(step["behavior"] != "Removed")
        case _:
            return False


def _unknown_bytes(model: dict[str, Any], vocab: dict[str, int], *, byte_level: bool) -> bytes | None:
    """Bytes that the vocabulary lacks; None if the unknown pieces are not single bytes."""
    if model["type"] not in ("BPE", "Unigram"):
        return None
    if byte_level:
        if _affixed(model):
            return None
        return bytes(byte for character, byte in byte_of_character().items() if character not in vocab)
    knows_all = model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    return b"" if knows_all else None


def _affixed(model: dict[str, Any]) -> bool:
    """Whether a character inside a word or at its end has a token of its own, other than at the beginning."""
    return bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
