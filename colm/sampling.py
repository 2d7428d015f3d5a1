"""How the next token is chosen, checked where it is made."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

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
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_CONSTRAINT_CHARS = 1 << 16
ConstraintKind = Literal["json_schema", "regex"]
CONSTRAINT_KINDS: tuple[ConstraintKind, ...] = get_args(ConstraintKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """What an answer's whole text must be, unless its length, or a stop string or stop id of the request, cuts it.

    The decode node compiles it, and refuses what it cannot hold an answer to.

    Raises:
        InvalidRequest: names the kind as the field, its value and the limit.
    """

    kind: ConstraintKind
    text: str
    """A JSON schema, as JSON; or a regular expression in Rust's syntax, without look-around, that matches all of it."""

    def __post_init__(self) -> None:
        checks.choice("constraint", self.kind, CONSTRAINT_KINDS)
        checks.utf8(self.kind, self.text)
        if not 1 <= len(self.text) <= MAX_CONSTRAINT_CHARS:
            raise InvalidRequest(self.kind, self.text, f"must have 1 to {MAX_CONSTRAINT_CHARS} characters")
        if self.kind == "json_schema":
            try:
                is_object = isinstance(json.loads(self.text), dict)
            except (ValueError, RecursionError):
                is_object = False
            if not is_object:
                raise InvalidRequest(self.kind, self.text, "must be a JSON object that is a JSON schema")


ANY_JSON_OBJECT = Constraint(kind="json_schema", text='{"type":"object"}')


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Choices of one request.

    They apply in this order, as in vLLM: `constraint`, `min_tokens`, `logit_bias`; `repetition_penalty`,
    `frequency_penalty`, `presence_penalty`; then greedy, or `temperature`, `top_k` and `min_p`, `top_p`. None changes a
    log probability: those are the model's own. Sources: OpenAI's API reference, "Create chat completion", for
    `presence_penalty`, `frequency_penalty` and `logit_bias`; vLLM's `SamplingParams` and `vllm/v1/sample` for the
    others and the order.

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
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer has. Above 0 new tokens become likelier."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as the answer has it."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that prompt or answer has, and multiplies those below."""
    min_p: float = 0.0
    """Keep the tokens whose probability is at least this part of the likeliest one's; after temperature."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to the logit of each."""
    min_tokens: int = 0
    """An answer has at least so many tokens before an end-of-answer token, a stop id or a stop string can end it. A
    stop string then counts where it begins behind them. A constraint that allows nothing but the end comes first."""
    constraint: Constraint | None = None
    """What the answer's text must be. It ends where nothing can follow; before, the model may end it wherever what is
    there is all that is asked for."""

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
        self._check_penalties()
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise InvalidRequest("constraint", self.constraint, "must be a Constraint")
        checks.integer("min_tokens", self.min_tokens, range(1 << 32), "must be an integer from 0 to max_new_tokens")

    def _check_penalties(self) -> None:
        limit = f"must be a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}"
        for field in ("presence_penalty", "frequency_penalty"):
            if abs(checks.number(field, getattr(self, field), limit)) > MAX_PENALTY:
                raise InvalidRequest(field, getattr(self, field), limit)
        limit = f"must be a number above 0 and at most {MAX_REPETITION_PENALTY:g}"
        if not 0.0 < checks.number("repetition_penalty", self.repetition_penalty, limit) <= MAX_REPETITION_PENALTY:
            raise InvalidRequest("repetition_penalty", self.repetition_penalty, limit)
        limit = "must be a number from 0 to 1"
        if not 0.0 <= checks.number("min_p", self.min_p, limit) <= 1.0:
            raise InvalidRequest("min_p", self.min_p, limit)
        limit = f"must be pairs of a token id and a number from -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}, an id once"
        seen = set[int]()
        for pair in _items("logit_bias", self.logit_bias, MAX_LOGIT_BIASES):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InvalidRequest("logit_bias", pair, limit)
            token_id = checks.integer("logit_bias", pair[0], TOKEN_IDS, limit)
            if abs(checks.number("logit_bias", pair[1], limit)) > MAX_LOGIT_BIAS or token_id in seen:
                raise InvalidRequest("logit_bias", pair, limit)
            seen.add(token_id)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Hold the token ids that are looked up in the logits against the model's vocabulary.

        Raises:
            InvalidRequest: one is none of the model's.
        """
        worst = max((token_id for token_id, _ in self.logit_bias), default=0)
        if worst >= vocab_size:
            raise InvalidRequest("logit_bias", worst, f"must be below the vocabulary size {vocab_size}")


def _items(field: str, values: Sequence[_Item], max_items: int) -> Sequence[_Item]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InvalidRequest(field, values, f"must be a tuple of at most {max_items}")
    if len(values) > max_items:
        raise InvalidRequest(field, f"{len(values)} of them", f"at most {max_items}")
    return values
