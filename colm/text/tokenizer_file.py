"""tokenizer.json, whose reader is a library in Rust that may fail in any way on a file that a stranger wrote."""

from collections.abc import Callable
from typing import Any, TypeVar

import tokenizers

from colm.errors import CheckpointError

_T = TypeVar("_T")


def parse_tokenizer(tokenizer_json: str) -> Any:
    """A `tokenizers.Tokenizer`.

    Raises:
        CheckpointError: it is malformed.
    """
    return reading(lambda: tokenizers.Tokenizer.from_str(tokenizer_json))


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
        raise CheckpointError(f"tokenizer.json cannot be read: {err}; import the model again") from err
    except BaseException as err:
        # A panic of the Rust side. Its class cannot be imported.
        if type(err).__name__ != "PanicException":
            raise
        raise CheckpointError(f"tokenizer.json cannot be read: {err}; import the model again") from err
