"""Files that a stranger wrote: read only where they are plain files, whole, and within a bound."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any, Final

from colm.errors import CheckpointError

MAX_JSON_BYTES: Final = 8 << 20
MAX_TOKENIZER_BYTES: Final = 32 << 20
_MAX_OBJECTS_BYTES: Final = 56 << 20
"""Of the objects that a JSON file is read into."""
_MAX_WEIGHTS_HEADER_BYTES: Final = 4 << 20
_MAX_WEIGHTS_COMMAS: Final = 1 << 17
"""Of a safetensors file's header, about five for each tensor. The library makes up to 64 bytes of each."""


def require_plain(path: Path) -> int:
    """The size of a file in bytes. A pipe would be waited for, and a device may never end.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no plain file, or cannot be looked at.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read: {err}") from err
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a plain file; put the file itself there")
    return found.st_size


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no plain file of at most `max_bytes` bytes.
    """
    num_bytes = require_plain(path)
    if num_bytes > max_bytes:
        raise CheckpointError(f"{path} has more than {max_bytes >> 20} MiB; no such file of a model is so large")
    try:
        # Whoever puts a pipe in its place meanwhile is not waited for either.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(num_bytes)
    except OSError as err:
        raise CheckpointError(f"{path} cannot be read: {err.strerror}") from err


def require_weights(path: Path) -> None:
    """Refuse what cannot be a safetensors file before its header is read, which the library does to the last byte.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no plain file, or its header is larger than that of any model.
    """
    require_plain(path)
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            num_commas = file.read(min(num_bytes, _MAX_WEIGHTS_HEADER_BYTES)).count(b",")
    except OSError as err:
        raise CheckpointError(f"{path} cannot be read: {err.strerror}") from err
    if num_bytes > _MAX_WEIGHTS_HEADER_BYTES or num_commas > _MAX_WEIGHTS_COMMAS:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: its header has {num_bytes} bytes and {num_commas} commas, "
            f"at most {_MAX_WEIGHTS_HEADER_BYTES} and {_MAX_WEIGHTS_COMMAS} are read"
        )


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no plain file of at most `max_bytes` bytes of UTF-8.
    """
    data = read_bytes(path, max_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{path} is not UTF-8: {err.reason} at byte {err.start}; fetch the file again") from err


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. NaN, infinities and half surrogate pairs are no JSON here.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it holds anything else.
    """
    text = read_text(path, MAX_JSON_BYTES)
    if (num_bytes := _objects_bytes(text)) > _MAX_OBJECTS_BYTES:
        raise CheckpointError(
            f"{path} holds too much: its values would take up to {num_bytes >> 20} MiB of memory, "
            f"at most {_MAX_OBJECTS_BYTES >> 20} are given; fetch the file again"
        )
    try:
        body = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            _refuse_half_pairs(body)
    except RecursionError as err:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deeply; fetch the file again") from err
    except ValueError as err:
        raise CheckpointError(f"{path} is not valid JSON: {err}; fetch the file again") from err
    if not isinstance(body, dict):
        raise CheckpointError(f"{path} holds {type(body).__name__}, not an object; fetch the file again")
    return body


def _objects_bytes(text: str) -> int:
    """The most memory that a JSON text and what it is read into take, without reading it.

    An object takes up to 240 bytes and a list or a short value 64, with their places in what holds them. Long texts
    take as much as they do in the file. Where an escape may stand for a character beyond 16 bits, all of its text takes
    four bytes a character, twice while it grows.
    """
    width = 8 if "\\u" in text else 1
    structure = 240 * text.count("{") + 64 * (text.count("[") + text.count(","))
    return sys.getsizeof(text) + max(sys.getsizeof(text), width * len(text)) + structure


def _refuse_half_pairs(body: object) -> None:
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += (*value.keys(), *value.values())


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")
