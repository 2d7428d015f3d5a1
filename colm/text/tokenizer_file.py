"""tokenizer.json, whose reader is a library in Rust that may fail in any way on a file that a stranger wrote."""

import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

import tokenizers

from colm.errors import CheckpointError

_T = TypeVar("_T")

_MAX_TOKEN_ID: Final = 1 << 24
"""The library makes tables as long as the largest id, and ends the process where memory does not suffice."""


def parse_tokenizer(tokenizer_json: str) -> Any:
    """A `tokenizers.Tokenizer`.

    Raises:
        CheckpointError: it is malformed.
    """
    _check_ids(tokenizer_json)
    return reading(lambda: tokenizers.Tokenizer.from_str(tokenizer_json))


def _check_ids(tokenizer_json: str) -> None:
    try:
        body = json.loads(tokenizer_json)
        vocab, added = body["model"].get("vocab"), body.get("added_tokens") or []
        ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(token["id"] for token in added)]
        worst = max(ids, default=0)
    except RecursionError as err:
        raise CheckpointError("tokenizer.json is nested too deeply; import the model again") from err
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise CheckpointError(f"tokenizer.json cannot be read: {err!r:.200}; import the model again") from err
    if not 0 <= worst < _MAX_TOKEN_ID:
        raise CheckpointError(f"tokenizer.json has a token id of {_MAX_TOKEN_ID} or more; import the model again")


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
