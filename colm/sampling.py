"""How the next token is chosen, checked where it is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from colm import checks
from colm.errors import InvalidRequest

_Item = TypeVar("_Item")

TOKEN_IDS = range(1 << 32)
"""Token ids that a message can carry; the server checks them against the model's vocabulary."""
MAX_TEMPERATURE = 10.0
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Choices of one request.

    Raises:
        InvalidRequest: names the field, its value and the limit.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    seed: int | None = None
    """Fixes the random choices; None draws them anew."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends at any of these tokens, besides the model's own."""
    top_logprobs: int = 0
    """Alternatives reported with each token."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-answer tokens."""

    def __post_init__(self) -> None:
        limit = f"must be a number from 0 to {MAX_TEMPERATURE}"
        if not 0.0 <= checks.number("temperature", self.temperature, limit) <= MAX_TEMPERATURE:
            raise InvalidRequest("temperature", self.temperature, limit)
        limit = "must be a number above 0 and at most 1"
        if not 0.0 < checks.number("top_p", self.top_p, limit) <= 1.0:
            raise InvalidRequest("top_p", self.top_p, limit)
        checks.integer("top_k", self.top_k, range(1 << 32), "must be 0 (all) or a positive integer below 2^32")
        if self.seed is not None:
            checks.integer("seed", self.seed, range(1 << 64), "must be an integer from 0 to 2^64 - 1")
        for text in _items("stop", self.stop, MAX_STOP_STRINGS):
            checks.utf8("stop", text)
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest("stop", text, f"each string must have 1 to {MAX_STOP_CHARS} characters")
        for token_id in _items("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS):
            checks.integer("stop_token_ids", token_id, TOKEN_IDS, "each must be an integer from 0 to 2^32 - 1")
        limit = f"must be an integer from 0 to {MAX_TOP_LOGPROBS}"
        checks.integer("top_logprobs", self.top_logprobs, range(MAX_TOP_LOGPROBS + 1), limit)
        checks.flag("ignore_eos", self.ignore_eos)


def _items(field: str, values: Sequence[_Item], max_items: int) -> Sequence[_Item]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InvalidRequest(field, values, f"must be a tuple of at most {max_items}")
    if len(values) > max_items:
        raise InvalidRequest(field, f"{len(values)} of them", f"at most {max_items}")
    return values
