"""Files as large as a reader lets them be, and made of whatever takes the most memory or time for its bytes."""

import json
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from colm.convert import from_any
from colm.files import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES
from tests.fuzz.files import CONFIG, read_checkpoint
from tests.tiny import tiny_checkpoint, tiny_tokenizer

_HEAD = b"GGUF" + struct.pack("<I", 3)
_ARRAY, _STRING, _UINT64 = 9, 8, 10


Pieces = Iterator[bytes]
"""A file's bytes: whoever writes them has no memory for the whole."""


def _again(piece: bytes, times: int) -> Pieces:
    at_once = max(1, (1 << 16) // len(piece))
    for begin in range(0, times, at_once):
        yield piece * min(at_once, times - begin)


def _fill(piece: str, num_bytes: int, before: str = "[", after: str = "0]") -> Pieces:
    """JSON of so many bytes, most of them one piece again and again."""
    encoded = piece.encode()
    yield before.encode()
    yield from _again(encoded, (num_bytes - len(before.encode()) - len(after)) // len(encoded))
    yield after.encode()


def _tokenizer(**parts: object) -> Pieces:
    yield json.dumps(json.loads(tiny_tokenizer().to_str()) | parts).encode()


def _vocabulary(num_tokens: int) -> Pieces:
    yield b'{"model":{"type":"BPE","merges":[],"vocab":{"a":0'
    yield from (f',"{number:x} ":{number}'.encode() for number in range(num_tokens))
    yield b"}}}"


def _split(regex: str) -> Pieces:
    return _tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"})


def _replace(pattern: str, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


_PADDING = {"strategy": {"Fixed": 1 << 60}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"} | {
    "pad_to_multiple_of": None
}
PIECES = {
    "objects": "{},",
    "lists": "[],",
    "texts": '"ab",',
    "fields": '{"a":1},',
    "numbers": "1e9,",
    "escapes": "\\u0041",
}
JSONS: dict[str, Callable[[], Pieces]] = {
    name: (lambda piece=piece: _fill(piece, MAX_JSON_BYTES))
    for name, piece in PIECES.items()  # type: ignore[misc]
} | {
    "one text": lambda: _fill("a", MAX_JSON_BYTES, '{"a":"', '"}'),
    "one text beyond 16 bits": lambda: _fill("a", MAX_JSON_BYTES, '{"a":"\U0001f600', '"}'),
    "one text of escapes": lambda: _fill("a", MAX_JSON_BYTES, '{"a":"\\ud83d\\ude00', '"}'),
    "too large": lambda: _again(b" ", MAX_JSON_BYTES + 1),
}
TOKENIZERS: dict[str, Callable[[], Pieces]] = {
    **{f"{name}, 2 MiB": (lambda piece=piece: _fill(piece, 2 << 20)) for name, piece in PIECES.items()},  # type: ignore[misc]
    "objects": lambda: _fill("{},", MAX_TOKENIZER_BYTES),
    "a text": lambda: _fill("a", MAX_TOKENIZER_BYTES, '{"a":"\U0001f600', '"}'),
    "too large": lambda: _again(b" ", MAX_TOKENIZER_BYTES + 1),
    "too many tokens": lambda: _vocabulary(600_000),
    "backtracking": lambda: _split("(a+)+b"),
    "two runs": lambda: _split(r"\w+\w+x"),
    "many choices": lambda: _split("a?" * 40 + "a" * 40),
    "a class in a class": lambda: _split("[a[(b+)+]]"),
    "growth": lambda: _tokenizer(normalizer=_replace("t", "t" * 60)),
    "doubling": lambda: _tokenizer(normalizer={"type": "Sequence", "normalizers": [_replace("t", "tt")] * 16}),
    "without end": lambda: _tokenizer(padding=_PADDING),
}
_NO_TENSOR = '"data_offsets":[0,0],"dtype":"F32","shape":[0]'
HEADERS: dict[str, Callable[[], Pieces]] = {
    "a long header": lambda: _weights(90 << 20, _again(b" ", 90 << 20)),
    "many tensors": lambda: _weights(len(b"".join(_tensors(30_000))), _tensors(30_000)),
    "a wide shape": lambda: _weights(
        4_000_000, _fill("0,", 4_000_000, '{"a":{"data_offsets":[0,0],"dtype":"F32","shape":[', "0]}}")
    ),
}
GGUFS: dict[str, Callable[[], Pieces]] = {
    "texts": lambda: _gguf(1, _array("k", _STRING, 1 << 20, _NOTHING)),
    "texts, often": lambda: _gguf(8, *(_array(f"k{n}", _STRING, 1 << 18, _NOTHING) for n in range(8))),
    "numbers": lambda: _gguf(4, *(_array(f"k{n}", _UINT64, 1 << 18, _NOTHING) for n in range(4))),
    "keys": lambda: _gguf(1 << 14, (_text(f"k{n}") + _A_BYTE for n in range(1 << 14))),
    "long keys": lambda: _gguf(1 << 14, (_text(f"{n:01024}") + _A_BYTE for n in range(1 << 14))),
    "a text": lambda: _gguf(
        1, [_text("general.architecture") + struct.pack("<IQ", _STRING, 64 << 20)], _again(b"a", 64 << 20)
    ),
    "tokens twice": lambda: _gguf(
        2,
        [_text("general.architecture") + struct.pack("<I", _STRING) + _text("llama")],
        _array("tokenizer.ggml.tokens", _STRING, 1 << 19, _text("ab")),
    ),
}
_NOTHING, _A_BYTE = bytes(8), struct.pack("<IB", 0, 0)


def _weights(num_bytes: int, header: Pieces) -> Pieces:
    yield num_bytes.to_bytes(8, "little")
    yield from header


def _tensors(count: int) -> Pieces:
    for number in range(count):
        yield f'{"," if number else "{"}"{number:07}":{{{_NO_TENSOR}}}'.encode()
    yield b"}"


def _text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def _array(key: str, kind: int, count: int, entry: bytes) -> Pieces:
    yield _text(key) + struct.pack("<IIQ", _ARRAY, kind, count)
    yield from _again(entry, count)


def _gguf(num_fields: int, *fields: Iterable[bytes]) -> Pieces:
    yield _HEAD + struct.pack("<QQ", 0, num_fields)
    for field in fields:
        yield from field


class LargeFiles:
    """One of the files above in place of a checkpoint's own, or by itself. Each is made when it is first drawn."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._whole = tiny_checkpoint(folder / "colm", CONFIG, tokenizer=True).path
        read_checkpoint(self._whole)

    def run(self, rng: random.Random) -> None:
        """One file."""
        kind, cases = rng.choice(list(CASES.items()))
        name = rng.choice(list(cases))
        self.read(kind, name)

    def read(self, kind: str, name: str) -> None:
        """Read a file as whoever finds it would."""
        if kind == "gguf":
            path = self._folder / f"{name}.gguf"
            if not path.exists():
                _write(path, kind, name)
            from_any(path, self._folder / "imported")
            return
        copy = self._folder / f"{kind} {name}"
        if not copy.exists():
            copy.mkdir()
            for whole in self._whole.iterdir():
                (copy / whole.name).symlink_to(whole)
            (copy / kind).unlink()
            _write(copy / kind, kind, name)
        read_checkpoint(copy)


def _write(path: Path, kind: str, name: str) -> None:
    with path.open("wb") as file:
        file.writelines(CASES[kind][name]())


CASES = {"config.json": JSONS, "tokenizer.json": TOKENIZERS, "model.safetensors": HEADERS, "gguf": GGUFS}
