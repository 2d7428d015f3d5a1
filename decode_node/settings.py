"""The options of a decode node."""

from typing import Annotated, ClassVar, Literal

from pydantic import ByteSize, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from colm import defaults
from colm.settings import PrefillLineSettings, Settings
from decode_node.plan import MAX_DRAFT_TOKENS
from decode_node.step_budget import MIN_STEP_TOKENS

KvCacheDtype = Literal["model", "int8"]
"""What keys and values are kept in: the model's dtype, or int8 with a bf16 scale a token and kv head (ADR 45)."""


class DecodeSettings(Settings):
    """How a decode node works, wherever it runs."""

    kv_cache_bytes: ByteSize = ByteSize(defaults.KV_CACHE_BYTES)
    """Memory of a decode node for keys and values, in bytes or with a unit, e.g. "4GiB"."""
    kv_cache_dtype: KvCacheDtype = "model"
    """What pages keep keys and values in: "model" for the model's dtype; "int8", with a scale a token and kv head, for
    half of bfloat16's memory and so about twice the tokens."""
    prefix_cache_bytes: ByteSize = ByteSize(defaults.DECODE_PREFIX_CACHE_BYTES)
    """Of that memory, what may hold prompts' keys and values that no request uses, for those that begin alike; it gives
    way to whoever needs it. 0: requests share nothing."""
    weights: Literal["stored", "int8", "q4"] = "stored"
    """How a decode node keeps its weights: as stored, or in 8.5 or 5 bits each. A step then reads fewer bytes, and
    every answer changes a little. On CPUs only; prefill nodes keep theirs as stored."""
    quantise_kv_projections: bool = False
    """Quantise those too that make the keys and values of the tokens that a decode node writes itself."""
    page_tokens: PositiveInt = defaults.PAGE_TOKENS
    """Tokens in a KV page; a request reserves whole pages."""
    max_batch_size: PositiveInt = defaults.MAX_BATCH_SIZE
    """Answers that a decode node advances in one step; more wait."""
    max_requests: PositiveInt = defaults.MAX_REQUESTS
    """Requests at once on a decode node, waiting and prefilling ones included; the next is refused."""
    step_tokens: Annotated[int, Field(ge=MIN_STEP_TOKENS)] | None = None
    """Tokens that a step of a decode node reads, in which one answer goes on: its next, and beside it drafts and pieces
    of prompts; two more for each further answer. By default as many as ride on one reading of the weights, which the
    node measures as it starts. More make prompts faster, and the answers beside them slower."""
    max_local_prefill_tokens: NonNegativeInt = defaults.MAX_LOCAL_PREFILL_TOKENS
    """Longest prompt, in tokens, that a decode node reads itself, in its steps; 0 always asks a prefill node."""
    max_draft_tokens: NonNegativeInt = Field(default=defaults.MAX_DRAFT_TOKENS, le=MAX_DRAFT_TOKENS)
    """Tokens that chain 1 may draft before all chains of an answer verify them, which changes how fast tokens come and
    never which. How many it drafts follows from what steps take and how many drafts are accepted; 0 drafts none."""
    draft_weights: Literal["stored", "int8", "q4"] = defaults.DRAFT_WEIGHTS
    """How the weights lie that draft, where `weights` is "stored": a copy of chain 1's in 8.5 or 5 bits each, which is
    faster to read and takes as much memory on top, or "stored" for chain 1's own. Changes no token; on CPUs only."""
    orphan_s: NonNegativeFloat = defaults.ORPHAN_S
    """Seconds that an answer whose gateway was lost is held for its client, and goes on; 0 gives it up at once."""


class PrefillPoolSettings(PrefillLineSettings):
    """How decode nodes use prefill nodes."""

    flag_prefix: ClassVar[str] = "prefill_"

    max_streams: PositiveInt = defaults.MAX_STREAMS
    """Prompts that a prefill node takes at once; they take turns."""
