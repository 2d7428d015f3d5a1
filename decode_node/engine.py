"""One decode step of a batch of requests, each at its own scale.

Shapes: R requests, L layers, M page table columns, D active model features, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not

import numpy as np
import torch
from colm_kernels.decode_attention import decode_attention
from colm_kernels.rotary import rotate_
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.kv import require_shared_kv
from colm.model.rope import Rope
from decode_node.kv_store import KvStore


@dataclass(frozen=True, slots=True)
class StepInput:
    """One request's share of a step."""

    token_id: int
    """Read in this step; its keys and values are written at `position`."""
    position: int
    """Tokens before it in the cache."""
    num_chains: int
    table_M: NDArray[np.int32]
    """The request's page ids; the same array at every step."""


class DecodeEngine:
    """All chains' weights over a store of pages."""

    def __init__(self, checkpoint: Checkpoint, store: KvStore) -> None:
        require_shared_kv(checkpoint.config)
        self.config = checkpoint.config
        self._store = store
        self._table = _BatchTable()
        self._model = checkpoint.load(dtype=store.layout.kv_format.dtype)
        self._rope = Rope(checkpoint.config)

    @torch.inference_mode()
    def step(self, inputs: Sequence[StepInput]) -> Tensor:
        """Feed one token of each request through its chains.

        Rows of larger scale are put first, so each chain's weights are read once for exactly the rows that need
        them. Keys and values come from chain 1 at every scale.

        Returns:
            logits_RV in the order of `inputs`.
        """
        order = sorted(range(len(inputs)), key=lambda row: -inputs[row].num_chains)
        rows = [inputs[row] for row in order]
        num_chains = rows[0].num_chains
        chain_rows = [sum(row.num_chains > chain for row in rows) for chain in range(num_chains)]
        positions_R = torch.tensor([row.position for row in rows])
        cos, sin = self._rope.tables(positions_R)
        table_RM = self._table.of(rows)
        slot_mapping_R = self._slot_mapping(table_RM, positions_R)
        context_lens_R = (positions_R + 1).to(torch.int32)

        x_RD = self._model.embedding.embed(torch.tensor([row.token_id for row in rows]), num_chains)
        blocks = self._model.blocks
        next_norms = [*(layer.attention_norm for layer in blocks[1:]), self._model.final_norm]
        normed_RD = blocks[0].attention_norm(x_RD, num_chains)
        for index, (layer, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            q_RHD, k_RKD, v_RKD = layer.attention.queries_keys_values(normed_RD, chain_rows)
            self._store.write_tokens(index, slot_mapping_R, k_RKD, v_RKD, cos, sin)
            rotate_(q_RHD, cos, sin)
            out_RKGD = decode_attention(
                layer.attention.group_by_kv_head(q_RHD, num_chains),
                self._store.k_pages_LBPKD[index],
                self._store.v_pages_LBPKD[index],
                table_RM,
                context_lens_R,
            )
            attended = layer.attention.ungroup(out_RKGD, num_chains)
            normed_RD = next_norm.add_(x_RD, layer.after_attention(x_RD, attended, chain_rows), num_chains)
        logits_RV = self._model.output_table.logits(normed_RD, chain_rows)
        in_order_RV = torch.empty_like(logits_RV)
        in_order_RV[order] = logits_RV
        return in_order_RV

    def _slot_mapping(self, table_RM: Tensor, positions_R: Tensor) -> Tensor:
        """Where the step's tokens are written, in every layer: slot_mapping_R, page * P + slot."""
        page_tokens = self._store.layout.page_tokens
        pages_R = table_RM.gather(1, (positions_R // page_tokens).unsqueeze(1)).squeeze(1)
        return pages_R.long() * page_tokens + positions_R % page_tokens


class _BatchTable:
    """The page tables of a batch, row by row; made anew only where another request is in a row.

    With a million tokens a row, and steps of milliseconds, a copy at each step would show.
    """

    def __init__(self) -> None:
        self._tables: list[NDArray[np.int32]] = []
        self._table_RM = torch.empty(0, 0, dtype=torch.int32)

    def of(self, rows: Sequence[StepInput]) -> Tensor:
        """table_RM, int32, ragged ends padded with page 0, which nobody reads there."""
        tables = [row.table_M for row in rows]
        if len(tables) != len(self._tables) or any(map(is_not, tables, self._tables)):
            self._table_RM = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
            for row_M, table_M in zip(self._table_RM.numpy(), tables, strict=True):
                row_M[: len(table_M)] = table_M
            self._tables = tables
        return self._table_RM
