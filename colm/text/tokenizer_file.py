"""tokenizer.json, whose reader is a library in Rust that may fail in any way on a file that a stranger wrote."""

import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

import tokenizers

from colm.child import TookTooMuch, ask_child
from colm.errors import CheckpointError
from colm.text import tokenizer_schema

_T = TypeVar("_T")

_LARGE_BYTES: Final = 2 << 20
_LARGE_CONTAINERS: Final = 1 << 17
"""Above either a child process checks the file, since Python's objects are up to 24 times as large as it."""
_CPU_S: Final = 10
"""LLaMA 3's, of 17 MB, takes half a second."""
_MEMORY_BYTES: Final = 2 << 30


def parse_tokenizer(tokenizer_json: bytes) -> tuple[Any, bool]:
    """A `tokenizers.Tokenizer` that neither cuts off nor pads, and whether its time grows with a text's length alone.

    Raises:
        CheckpointError: it is malformed, or may take more time or memory than published tokenizers.
    """
    is_linear = check(tokenizer_json)
    encoder = reading(lambda: tokenizers.Tokenizer.from_buffer(tokenizer_json))
    encoder.no_truncation()
    encoder.no_padding()
    return encoder, is_linear


def check(tokenizer_json: bytes) -> bool:
    """Whether a tokenizer's time grows with a text's length alone.

    Raises:
        CheckpointError: it is malformed, or may take more time or memory than published tokenizers.
    """
    is_large = len(tokenizer_json) > _LARGE_BYTES or sum(map(tokenizer_json.count, (b"[", b"{"))) > _LARGE_CONTAINERS
    try:
        return _check_in_a_child(tokenizer_json) if is_large else tokenizer_schema.check_tokenizer(tokenizer_json)
    except ValueError as err:
        raise CheckpointError(f"tokenizer.json cannot be read: {err}; import the model again") from err


def part_of(step: Any) -> dict[str, Any] | None:
    """A normalizer, pre-tokenizer or decoder as tokenizer.json has it."""
    return None if step is None else dict(json.loads(step.__getstate__()))


def _check_in_a_child(tokenizer_json: bytes) -> bool:
    try:
        words = ["-m", tokenizer_schema.__name__, str(_CPU_S), str(_MEMORY_BYTES)]
        answer = ask_child(words, tokenizer_json, timeout_s=120.0)
    except TookTooMuch as err:
        raise ValueError(f"it takes more than {_CPU_S} s of CPU time or {_MEMORY_BYTES >> 30} GiB of memory") from err
    if "problem" in answer:
        raise ValueError(answer["problem"])
    return bool(answer["is_linear"])


def reading(work: Callable[[], _T]) -> _T:
    """What a call of the library on a tokenizer's own parts returns.

    Raises:
        CheckpointError: the parts do not fit together.
    """
    try:
        return work()
    except MemoryError:
        raise
    except Exception as err:  # the Rust side raises Exception itself, for any malformed file
        raise CheckpointError(f"tokenizer.json cannot be read: {err!s:.400}; import the model again") from err
    except BaseException as err:
        # A panic of the Rust side. Its class cannot be imported.
        if type(err).__name__ != "PanicException":
            raise
        raise CheckpointError(f"tokenizer.json cannot be read: {err!s:.400}; import the model again") from err
