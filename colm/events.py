"""What happens to a request, in order: accepted, prefill progress, tokens, finished; queued wherever it waits."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The request is valid and on its way to a decode node."""

    request_id: str
    model: str
    num_prompt_tokens: int
    num_chains: int
    max_new_tokens: int
    timeout_s: float
    """Seconds until the request's deadline."""


class WaitsFor(Enum):
    """What a request waits for."""

    DECODE_NODE = "a decode node"
    PAGES = "KV pages"
    PREFILL_NODE = "a prefill node"
    BATCH = "a place in the batch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The request waits. Repeated while it waits, so that a long silence always means a fault."""

    waits_for: WaitsFor
    num_ahead: int
    """Requests that come before it."""
    estimated_wait_s: float | None = None
    """How long it will wait for what goes before it, as a prefill node estimates; None where nobody can tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """A decode node has set aside memory for the prompt and the whole answer."""

    num_pages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillProgress:
    """How much of the prompt's keys and values has arrived, averaged over layers."""

    num_tokens_done: int
    num_tokens_total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One generated token."""

    token_id: int
    text: str
    """Text this token completed; empty while a character or a possible stop string is unfinished."""
    logprob: float
    """Natural log of the token's probability at this scale, before temperature, top_k and top_p."""
    num_chains: int
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest tokens, likeliest first."""


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request consumed."""

    num_prompt_tokens: int
    num_prefill_tokens: int
    """Computed by the prefill node."""
    num_decode_prompt_tokens: int
    """Prompt tokens computed by the decode node."""
    num_new_tokens: int
    kv_received_bytes: int
    """Payload of the keys and values received."""
    num_kv_streams: int
    """Streams opened; above 1 when a prefill node was lost on the way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where the time went, seen from the decode node."""

    queue_s: float
    """Time waiting for pages, for a prefill node, and in the prefill node's own line."""
    prefill_s: float
    """From the start of the computation to the last tile, over all streams that brought keys and values."""
    first_token_s: float
    """From the request's arrival to the first token."""
    decode_s: float
    """From the first token to the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The end of an answer; nothing follows."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    text: str = ""
    """Text held back until no stop string could follow; goes after the last token's."""


Event = Accepted | Queued | Reserved | PrefillProgress | Token | Finished
