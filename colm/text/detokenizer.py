"""Token ids back into text, all at once or one at a time, with the same result."""

import codecs
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from colm.errors import UnsupportedModel
from colm.text.tokenizer_file import part_of

SENTENCEPIECE_SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The bytes that each token stands for.

    Text is the UTF-8 decoding of the tokens' bytes end to end. They may be cut anywhere, so a stream shows text early
    and still agrees with `decode`. Each invalid byte becomes a replacement character; the `tokenizers` package replaces
    the whole run of SentencePiece byte tokens around it.

    Args:
        tokenizer: a `tokenizers.Tokenizer` with a byte-level or a SentencePiece decoder.

    Raises:
        UnsupportedModel: any other decoder.
    """

    def __init__(self, tokenizer: Any) -> None:
        kinds = {step["type"]: step for step in _steps(part_of(tokenizer.decoder))}
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds.keys() & {"ByteFallback", "Metaspace"}:
            raise UnsupportedModel(
                f"tokenizer.json: decoder {sorted(kinds)} is not supported; use a byte-level or SentencePiece tokenizer"
            )
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added: dict[int, bytes] = {token_id: token.content.encode() for token_id, token in added.items()}
        metaspace = kinds.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        self.strips_first_space = not self._byte_level and (metaspace or "Strip" in kinds)
        """The encoder put a space before the text; decoding takes it away again."""
        self._cache: dict[int, bytes] = {}

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Bytes of one token; none for an id outside the vocabulary, nor for a skipped special token."""
        if skip_special and token_id in self._special_ids:
            return b""
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._compute(token_id)
        return found

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of a whole answer."""
        stream = TextStream(self, skip_special=skip_special)
        parts = [stream.push(token_id) for token_id in ids]
        return "".join(parts) + stream.flush()

    def _compute(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return byte_level_bytes(token)
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace(SENTENCEPIECE_SPACE, " ").encode()


class TextStream:
    """Text of an answer that is still growing.

    A push takes time for the token's own length, whatever came before. All pushes and the flush together equal
    `Detokenizer.decode` of all ids.
    """

    def __init__(self, detokenizer: Detokenizer, *, skip_special: bool = True, keeps_first_space: bool = False) -> None:
        self._detokenizer = detokenizer
        self._skip_special = skip_special
        self._at_start = not keeps_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that is now complete. An unfinished character is held back."""
        data = self._detokenizer.token_bytes(token_id, skip_special=self._skip_special)
        if data and self._at_start:
            self._at_start = False
            if self._detokenizer.strips_first_space:
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def peek(self, token_id: int) -> str:
        """What `push` would return; nothing changes."""
        at_start, state = self._at_start, self._utf8.getstate()
        text = self.push(token_id)
        self._at_start = at_start
        self._utf8.setstate(state)
        return text

    def flush(self) -> str:
        """End the text; a character that was never completed becomes a replacement character."""
        return self._utf8.decode(b"", final=True)


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary. One with characters other than GPT-2's stand-ins is plain text."""
    table = byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the others count up from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
