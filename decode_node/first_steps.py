"""Runs the steps whose times a node measures as it starts.

Shapes: M pages of a table.
"""

from functools import partial

import numpy as np
from colm_kernels.decode_attention import MAX_QUERY_TOKENS

from colm.clock import Clock
from decode_node.engine import DecodeEngine
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from decode_node.step_budget import FastestSteps, measure


def measured(engine: DecodeEngine, store: KvStore, clock: Clock, *, drafts: bool) -> FastestSteps:
    """Measure steps of one answer, in pages that nobody may have yet: it writes into them.

    Args:
        engine: of the node.
        store: its pages.
        clock: measures.
        drafts: whether answers may draft.
    """
    num_chains = engine.config.num_chains
    max_tokens = min(engine.max_exact_tokens, store.num_pages * store.layout.page_tokens, engine.config.max_context)
    table_M = np.arange(store.layout.pages(max_tokens), dtype=np.int32)

    def run(*rows: PlanRow) -> None:
        engine.step(StepPlan(rows))[0, 0].item()  # a GPU has then done it

    def step(num_tokens: int) -> None:
        starts = range(0, num_tokens, MAX_QUERY_TOKENS)
        counts = [min(MAX_QUERY_TOKENS, num_tokens - start) for start in starts]
        row = partial(PlanRow, num_chains=num_chains, table_M=table_M)
        run(*(row((0,) * count, start, num_logits=count) for start, count in zip(starts, counts, strict=True)))

    def draft() -> None:
        run(PlanRow((0,), 0, 1, table_M, is_draft=True))

    may_draft = drafts and num_chains > 1
    return measure(step, clock, max_tokens=max_tokens, draft=draft if may_draft else None)
