"""One decode step of a batch of requests, each at its own scale.

Shapes: R requests, L layers, M page table columns, D active model features, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not

import numpy as np
import torch
from colm_kernels.decode_attention import decode_attention
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.kv import require_shared_kv
from colm.model.block import Rows
from colm.model.rope import inverse_frequencies, rotation
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
        self._inverse_frequencies = inverse_frequencies(checkpoint.config)

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
        model_rows = Rows(chain_rows, *rotation(self._inverse_frequencies, positions_R))
        table_RM = self._table.of(rows)
        slot_mapping_R = self._slot_mapping(table_RM, positions_R)
        context_lens_R = (positions_R + 1).to(torch.int32)

        x_RD = self._model.embedding.embed(torch.tensor([row.token_id for row in rows]), num_chains)
        blocks = self._model.blocks
        next_norms = [*(layer.attention_norm for layer in blocks[1:]), self._model.final_norm]
        normed_RD = blocks[0].attention_norm(x_RD, num_chains)
        for index, (layer, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            cache = _LayerPages(self._store, index, slot_mapping_R, table_RM, context_lens_R)
            delta_RD = layer.step(x_RD, normed_RD, model_rows, cache)
            # Added to x by the norm that reads the sum: one pass over the rows in place of two.
            normed_RD = next_norm.add_(x_RD, delta_RD, num_chains)
        logits_RV = self._model.output_table.logits(normed_RD, chain_rows)
        in_order_RV = torch.empty_like(logits_RV)
        in_order_RV[order] = logits_RV
        return in_order_RV

    def _slot_mapping(self, table_RM: Tensor, positions_R: Tensor) -> Tensor:
        """Where the step's tokens are written, in every layer: slot_mapping_R, page * P + slot."""
        page_tokens = self._store.layout.page_tokens
        pages_R = table_RM.gather(1, (positions_R // page_tokens).unsqueeze(1)).squeeze(1)
        return pages_R.long() * page_tokens + positions_R % page_tokens


@dataclass(frozen=True, slots=True)
class _LayerPages:
    """One layer's pages, as the rows of a step write and read them."""

    store: KvStore
    layer: int
    slot_mapping_R: Tensor
    table_RM: Tensor
    context_lens_R: Tensor

    def write(self, k_RKE: Tensor, v_RKE: Tensor, rows: Rows) -> None:
        self.store.write_tokens(self.layer, self.slot_mapping_R, k_RKE, v_RKE, rows.cos_RE, rows.sin_RE)

    def attend(self, q_RKGE: Tensor) -> Tensor:
        k_pages_BPKE, v_pages_BPKE = self.store.k_pages_LBPKD[self.layer], self.store.v_pages_LBPKD[self.layer]
        return decode_attention(q_RKGE, k_pages_BPKE, v_pages_BPKE, self.table_RM, self.context_lens_R)


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
