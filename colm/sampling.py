"""How the next token is chosen, checked where it is made."""

import math
from dataclasses import dataclass

from colm.errors import InvalidRequest

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
    """The answer ends before any of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends at any of these tokens, besides the model's own."""
    top_logprobs: int = 0
    """Alternatives reported with each token."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-answer tokens."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= MAX_TEMPERATURE):
            raise InvalidRequest("temperature", self.temperature, f"must be between 0 and {MAX_TEMPERATURE}")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidRequest("top_p", self.top_p, "must be above 0 and at most 1")
        if not 0 <= self.top_k < 1 << 32:
            raise InvalidRequest("top_k", self.top_k, "must be 0 (all) or a positive count")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise InvalidRequest("seed", self.seed, "must be between 0 and 2^64 - 1")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest("stop", text, f"each string must have 1 to {MAX_STOP_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest("stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOP_TOKEN_IDS} ids")
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < 1 << 32:
                raise InvalidRequest("stop_token_ids", token_id, "must be token ids, 0 or above")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest("top_logprobs", self.top_logprobs, f"must be between 0 and {MAX_TOP_LOGPROBS}")
