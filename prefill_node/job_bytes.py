"""What a job takes of the memory for prompts, said before it begins."""

from colm.wire.tile_codec import WINDOW_BYTES
from prefill_node.engine import PrefillEngine
from prefill_node.sparse.prompt_plans import PromptPlans


def job_bytes(
    engine: PrefillEngine,
    num_tokens: int,
    sparse: PromptPlans | None = None,
    num_cached_tokens: int = 0,
    *,
    reads_last_token: bool = False,
) -> int:
    """What a job of so many tokens holds at most once it has begun: a run, a pack's rows, and a full window."""
    kv_format, tile_bytes = engine.kv_format, min(num_tokens, engine.tile_tokens) * engine.kv_format.layer_token_bytes
    # The engine and the thread of kept tiles may each make a tile that fills the window.
    last_bytes = tile_bytes * (2 if 0 < num_cached_tokens < num_tokens else 1)
    window_bytes = min(num_tokens * kv_format.token_bytes, WINDOW_BYTES + last_bytes)
    run_bytes = engine.memory_bytes(
        num_tokens, sparse, num_cached_tokens=num_cached_tokens, reads_last_token=reads_last_token
    )
    return run_bytes + engine.pack_bytes(num_tokens) + window_bytes
