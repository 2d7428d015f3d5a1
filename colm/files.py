"""Files that a stranger wrote: read only where they are plain files, whole, and within a bound."""

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from colm.errors import CheckpointError

MAX_JSON_BYTES: Final = 16 << 20
MAX_TOKENIZER_BYTES: Final = 64 << 20


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


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no plain file of at most `max_bytes` bytes of UTF-8.
    """
    require_plain(path)
    try:
        # Whoever puts a pipe in its place meanwhile is not waited for either.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as err:
        raise CheckpointError(f"{path} cannot be read: {err.strerror}") from err
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} has more than {max_bytes >> 20} MiB; no such file of a model is so large")
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
    try:
        body = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError as err:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deeply; fetch the file again") from err
    except ValueError as err:
        raise CheckpointError(f"{path} is not valid JSON: {err}; fetch the file again") from err
    if not isinstance(body, dict):
        raise CheckpointError(f"{path} holds {type(body).__name__}, not an object; fetch the file again")
    return body


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")
