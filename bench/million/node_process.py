"""The prefill node of the benchmark, in a process of its own.

Shapes: N prompt tokens, T tokens of a tile, S keys up to its end, H query heads, E head dim, X listed keys.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
from colm_kernels import tolerance
from colm_kernels.sparse_index import SparseIndex
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from colm_kernels.steps import Steps
from torch import Tensor

from colm.wire.security import Security
from prefill_node import engine
from prefill_node.node import PrefillNode, PrefillOptions
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.prompt_plans import PromptPlans

CHECKED_HEADS = 2
"""Of the rows whose sparse attention is held against the definition."""


@dataclass(kw_only=True, slots=True)
class Seen:
    """What the node did, as a prompt's own operations have it."""

    densities: dict[int, float] = field(default_factory=dict)
    """Share of the causal pairs that each planned layer attends to, estimated from 32 of its row blocks."""
    num_checked_rows: int = 0
    """Rows of the sparse kernel that were computed again by the definition."""


def serve(options: PrefillOptions, pipe: Connection) -> None:
    """The process: says its address, then answers each message with what it has seen since the last one."""
    asyncio.run(_serve(options, pipe))


async def _serve(options: PrefillOptions, pipe: Connection) -> None:
    seen = Seen()
    with observed(seen):
        node = PrefillNode(options, Security())
        await node.start()
        pipe.send((node.address, node.fingerprint))
        try:
            while await asyncio.to_thread(pipe.recv):
                pipe.send(Seen(densities=dict(seen.densities), num_checked_rows=seen.num_checked_rows))
                seen.densities.clear()
                seen.num_checked_rows = 0
        except EOFError:
            pass
        await node.stop()


@contextmanager
def observed(seen: Seen) -> Iterator[None]:
    """Note what plans list, and hold the first row of a tile of each planned layer against the definition."""
    plan, attend = PromptPlans.plan, sparse_prefill_attention
    is_checked = True

    def planning(self: PromptPlans, layer: int, *args: Any) -> Steps[LayerPlan | None]:
        nonlocal is_checked
        found = yield from plan(self, layer, *args)
        seen.densities[layer] = 1.0 if found is None else found.density()
        is_checked = False
        return found

    def attending(q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor, index: SparseIndex, **options: Any) -> Any:
        nonlocal is_checked
        out_THE, lse_TH = attend(q_THE, k_KSE, v_KSE, index, **options)
        # A tile far enough inside the prompt that much is left out.
        if not is_checked and k_KSE.shape[1] >= 8 * len(q_THE) and index.density() < 1.0:
            is_checked = True
            for head in range(min(CHECKED_HEADS, q_THE.shape[1])):
                check_row(q_THE, k_KSE, v_KSE, index, out_THE, head)
                seen.num_checked_rows += 1
        return out_THE, lse_TH

    with patch.object(PromptPlans, "plan", planning), patch.object(engine, "sparse_prefill_attention", attending):
        yield


def check_row(q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor, index: SparseIndex, out_THE: Tensor, head: int) -> None:
    """Hold a tile's first row, of one head, against attention to what the index lists, in float64.

    Raises:
        AssertionError: it is off by more than the kernel's budget.
    """
    num_heads, num_kv_heads = q_THE.shape[1], len(k_KSE)
    kv_head, number = head * num_kv_heads // num_heads, head * index.num_lists // num_heads
    at, position = number * index.tiling.num_row_blocks, k_KSE.shape[1] - len(q_THE)
    blocks = index.block_ids[index.block_offsets[at] : index.block_offsets[at + 1]].long()
    columns = index.column_ids[index.column_offsets[at] : index.column_offsets[at + 1]].long()
    of_blocks = (blocks.unsqueeze(1) * index.tiling.key_block + torch.arange(index.tiling.key_block)).flatten()
    key_X = torch.cat((columns, of_blocks))
    key_X = key_X[key_X <= position]
    of_kv_head = slice(kv_head, kv_head + 1)
    # The row sees all that is left of its list: attention of one query to the last of so many keys.
    expected, _ = tolerance.prefill_attention(
        q_THE[:1, head : head + 1], k_KSE[of_kv_head, key_X], v_KSE[of_kv_head, key_X]
    )
    expected.check(out_THE[:1, head : head + 1])
