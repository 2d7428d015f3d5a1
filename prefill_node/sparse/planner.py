"""From a layer's last queries and all its keys to a plan.

Shapes: R rows, S keys, H query heads, K kv heads, G = H / K, E head dim.
"""

from collections.abc import Sequence

import torch
from colm_kernels.sparse_estimate import block_means, vertical_slash_mass
from colm_kernels.steps import Steps
from torch import Tensor

from colm.model.config import ChainConfig
from prefill_node.sparse.lines import Lines, heaviest, lines_within
from prefill_node.sparse.patterns import AShape, BlockSparse, HeadPattern, PatternFile, VerticalSlash
from prefill_node.sparse.plan import LayerPlan, ListPlan
from prefill_node.sparse.policy import KEY_BLOCK, ROW_BLOCK, SparsePolicy

_MARK_BYTES = 4 + 8 + 3
"""Of a row and a key block, while blocks at listed distances are found: marks, their sums, and which are listed."""
ESTIMATION_ROWS = 64
"""The prompt's last queries, of which a plan is made: all keys of a layer are there before its attention starts."""


class SparsePlanner:
    """Plans the sparse attention of a model's layers.

    Args:
        config: the model, of which chain 1 is prefilled.
        policy: what may be left out.
        patterns: each head's own, instead of the policy's budget; None for none.

    Raises:
        ValueError: the policy names a layer that the model does not have.
    """

    def __init__(self, config: ChainConfig, policy: SparsePolicy, patterns: PatternFile | None = None) -> None:
        if max(policy.dense_layers, default=0) >= config.num_layers:
            raise ValueError(f"dense_layers={policy.dense_layers} names a layer past the model's {config.num_layers}")
        self.config = config
        self.policy = policy
        self._patterns = patterns

    def memory_bytes(self, num_tokens: int, tile_tokens: int, *, audited_rows: int) -> int:
        """Predicted peak of planning a layer, and of an index made from its plan."""
        config, policy = self.config, self.policy
        num_lists, group = config.num_kv_heads, config.chains[0] // config.num_kv_heads
        # In bytes a token: columns and diagonals, their quotients and gains in fp32; gains of all heads in fp64, twice
        # as they are put together.
        of_head = 5 * 4 + 8 + 2 * 8 * group
        if policy.mass is not None:
            of_head += 2 * 8 + (3 * 8 + 1) * group  # they are sorted, and added up in that order
        # Blocks given to each audited row, as marks and their sums.
        num_blocks = num_tokens // KEY_BLOCK
        of_audit = num_blocks * audited_rows * _MARK_BYTES
        num_columns = num_tokens if policy.keys_per_row is None else min(policy.keys_per_row, num_tokens)
        num_row_blocks = -(-min(num_tokens, tile_tokens) // ROW_BLOCK)
        of_index = 4 * num_lists * num_row_blocks * (num_blocks + num_columns)
        of_lists = 2 * 8 * num_lists * num_columns
        return max(num_tokens * of_head, of_audit, of_index) + of_lists

    def plan(self, layer: int, q_RHE: Tensor, k_KSE: Tensor) -> Steps[LayerPlan | None]:
        """What a layer attends to.

        Holds the attention of a few rows to a few keys at a time, and no more than numbers by key beside it.

        Args:
            layer: its number.
            q_RHE: rotated queries of the prompt's last tokens, `ESTIMATION_ROWS` or all.
            k_KSE: rotated keys of the whole prompt.

        Returns:
            The plan, one list a kv head; None where the layer is to be dense.
        """
        num_kv_heads, num_tokens, _ = k_KSE.shape
        if self.policy.is_dense(layer, num_tokens):
            return None
        group = q_RHE.shape[1] // num_kv_heads
        lists = []
        for kv_head in range(num_kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            q_RGE = q_RHE[:, heads]
            if self._patterns is None:
                lists.append((yield from _list_within(q_RGE, k_KSE[kv_head], self.policy)))
            else:
                k_1SE = k_KSE[kv_head : kv_head + 1]
                masses = yield from vertical_slash_mass(q_RGE, k_1SE, num_lists=group, num_rows=len(q_RGE))
                lists.append(list_of(self._patterns.layers[layer][heads], *masses, self.policy))
        return layer_plan(lists, k_KSE, self.policy)


def layer_plan(lists: Sequence[ListPlan], k_KSE: Tensor, policy: SparsePolicy) -> LayerPlan:
    """The plan of a layer's lists, one a kv head or one a query head."""
    num_tokens = k_KSE.shape[1]
    chooses_by_queries = any(any(plan.num_blocks) for plan in lists)
    return LayerPlan(
        num_tokens=num_tokens,
        dense_from=num_tokens - policy.last_rows_dense,
        lists=tuple(lists),
        k_means_KBE=block_means(k_KSE, KEY_BLOCK) if chooses_by_queries else k_KSE[:, :0].float(),
    )


def list_of(patterns: Sequence[HeadPattern], vertical_GS: Tensor, slash_GS: Tensor, policy: SparsePolicy) -> ListPlan:
    """What query heads with patterns of their own attend to: each what another asks for, too.

    Args:
        patterns: one a query head of the list.
        vertical_GS: their attention by key position.
        slash_GS: their attention by distance.
        policy: what every row is given.
    """
    sink_tokens, lines, num_blocks = policy.sink_tokens, [_window(policy.local_tokens, vertical_GS.device)], []
    for pattern, vertical_S, slash_S in zip(patterns, vertical_GS, slash_GS, strict=True):
        num_blocks.append(pattern.num_blocks if isinstance(pattern, BlockSparse) else 0)
        if isinstance(pattern, AShape):
            sink_tokens = max(sink_tokens, pattern.sink_tokens)
            lines.append(_window(pattern.local_tokens, vertical_S.device))
        elif isinstance(pattern, VerticalSlash):
            lines.append(heaviest(vertical_S, slash_S, pattern))
    return ListPlan(
        sink_tokens=sink_tokens, lines=tuple(lines), num_blocks=tuple(num_blocks) if any(num_blocks) else ()
    )


def _list_within(q_RGE: Tensor, k_SE: Tensor, policy: SparsePolicy) -> Steps[ListPlan]:
    window = _window(policy.local_tokens, k_SE.device)
    # Nothing is left out, so there is nothing to choose.
    if policy.mass == 1.0 or (policy.keys_per_row is not None and policy.keys_per_row >= len(k_SE)):
        return ListPlan(sink_tokens=policy.sink_tokens, lines=(window,), is_dense=True)
    chosen = yield from lines_within(q_RGE, k_SE, policy)
    return ListPlan(sink_tokens=policy.sink_tokens, lines=(window, chosen))


def _window(local_tokens: int, device: torch.device) -> Lines:
    nearest_W = torch.zeros(1, dtype=torch.int64, device=device)
    return Lines(nearest_W[:0], nearest_W, nearest_W + local_tokens - 1)
