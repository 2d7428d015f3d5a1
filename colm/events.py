"""What happens to a request, in order: accepted, prefill progress, tokens, finished; queued wherever it waits."""

from collections import Counter
from collections.abc import Iterable
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
    trace_id: str = ""
    """Of the request's trace, 32 hex digits; empty if none is recorded."""
    revision: str = ""
    """Names the weights that answer; empty from a gateway that does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """A decode node goes on sending an answer to another call."""

    request_id: str
    num_prompt_tokens: int
    num_chains: int
    max_new_tokens: int
    remaining_s: float
    """Seconds until the request's deadline; 0 without one."""


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
    """How long it will wait for what goes before it, as the node estimates; None where nobody can tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """A decode node has set aside memory for the prompt and the whole answer."""

    num_pages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillProgress:
    """How much of the prompt's keys and values has arrived or, of the next tile, is done; averaged over layers."""

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
    confirms_provisional: bool | None = None
    """Of the first token, where a `ProvisionalToken` came before it: whether it is the same; else None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvisionalToken:
    """Chain 1's own most likely next token, before the answer's first, which confirms or replaces it.

    It is no part of the answer. At most one comes.
    """

    token_id: int
    text: str = ""
    """As if the answer began with it."""


def tokens_by_scale(tokens: Iterable[Token]) -> dict[str, int]:
    """How many tokens were made by each number of chains, as JSON has it."""
    counts = Counter(token.num_chains for token in tokens)
    return {str(num_chains): counts[num_chains] for num_chains in sorted(counts)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleChanged:
    """Tokens that no step has begun with are made at this scale."""

    num_chains: int
    """Most chains."""
    min_chains: int
    """Fewest."""


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request consumed."""

    num_prompt_tokens: int
    num_prefill_tokens: int
    """Prompt tokens whose keys and values are the prefill node's work."""
    num_decode_prompt_tokens: int
    """Prompt tokens computed by the decode node."""
    num_new_tokens: int
    kv_received_bytes: int
    """Payload of the keys and values received, as it was on the wire."""
    kv_effective_bytes: int
    """What those keys and values take in the cache; equal with the raw codec."""
    num_kv_streams: int
    """Streams opened; above 1 when a prefill node was lost on the way."""
    kv_shared_bytes: int = 0
    """Of `kv_received_bytes`, those that came through shared memory and not through a stream."""
    num_draft_tokens: int = 0
    """Drafted by chain 1 and verified by all chains."""
    num_accepted_tokens: int = 0
    """Drafts that became tokens of the answer."""
    num_prefill_cached_tokens: int = 0
    """Of `num_prefill_tokens`, those that the prefill node had kept; it has computed the others."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values another request had brought to the decode node, or was about to."""
    num_decode_nodes: int = 1
    """That worked for the answer; above 1 when one was lost on the way."""


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
    provisional_token_s: float | None = None
    """From the request's arrival to the provisional token; None where none was sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecall:
    """How much of a layer's attention its sparse plan recalls, estimated before the plan was used."""

    layer: int
    num_rows: int
    """Sampled rows that the estimate is of; 0 where the whole layer was dense."""
    recall: float
    """Mean share of the attention that the plan recalls, over rows and heads."""
    recall_bound: float
    """With 95% probability the mean over all rows is no less."""
    num_dense_heads: int
    """Query heads that attended to everything instead, because they might recall too little; the recall is without
    this, so what was used recalls no less."""

    @classmethod
    def of_dense(cls, layer: int, *, num_heads: int) -> "LayerRecall":
        """Of a layer that attended to everything."""
        return cls(layer=layer, num_rows=0, recall=1.0, recall_bound=1.0, num_dense_heads=num_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseReport:
    """What became of a prompt's sparse attention."""

    layers: tuple[LayerRecall, ...]
    """All that attend at the prefill: every layer but the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The end of an answer; nothing follows."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    text: str = ""
    """Text held back until no stop string could follow; goes after the last token's."""
    sparse: SparseReport | None = None
    """Where sparse attention was asked for; None with dense attention, where there was nothing to prefill, and where
    the prefill node was lost between its last tile and its last word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconnecting:
    """The gateway was lost; the client asks it for the rest of the answer. Made by the client itself, never sent."""

    in_s: float
    """Seconds until it does."""
    cause: str


Event = (
    Accepted
    | Resumed
    | Queued
    | Reserved
    | PrefillProgress
    | ProvisionalToken
    | Token
    | ScaleChanged
    | Finished
    | Reconnecting
)
