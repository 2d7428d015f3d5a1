"""One decode step of a batch of requests, each at its own scale.

Shapes: R requests, L layers, M page table columns, D active model features, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from colm_kernels.decode_attention import decode_attention
from colm_kernels.rotary import rotate_
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.kv import require_shared_kv
from colm.model.rope import inverse_frequencies, rotation
from colm.model.transformer import ChainBlock
from decode_node.kv_store import KvStore


@dataclass(frozen=True, slots=True)
class StepInput:
    """One request's share of a step."""

    token_id: int
    """Read in this step; its keys and values are written at `position`."""
    position: int
    """Tokens before it in the cache."""
    num_chains: int
    table_LM: NDArray[np.int32]


class DecodeEngine:
    """All chains' weights over a store of pages."""

    def __init__(self, checkpoint: Checkpoint, store: KvStore) -> None:
        require_shared_kv(checkpoint.config)
        self.config = checkpoint.config
        self._store = store
        self._model = checkpoint.load(dtype=store.layout.dtype)
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
        cos, sin = rotation(self._inverse_frequencies, positions_R)
        tables_LRM = _stack_tables(rows)
        slot_mapping_LR = self._slot_mapping(tables_LRM, positions_R)
        context_lens_R = (positions_R + 1).to(torch.int32)

        x_RD = self._model.embedding.embed(torch.tensor([row.token_id for row in rows]), num_chains)
        blocks = self._model.blocks
        next_norms = [*(layer.attention_norm for layer in blocks[1:]), self._model.final_norm]
        normed_RD = blocks[0].attention_norm(x_RD, num_chains)
        for index, (layer, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            q_RHD, k_RKD, v_RKD = layer.attention.queries_keys_values(normed_RD, chain_rows)
            self._store.write_tokens(slot_mapping_LR[index], k_RKD, v_RKD, cos, sin)
            rotate_(q_RHD, cos, sin)
            attended = self._attend(layer, q_RHD, num_chains, tables_LRM[index], context_lens_R)
            normed_RD = layer.ffn_norm.add_(x_RD, layer.attention.wo(attended, chain_rows), num_chains)
            normed_RD = next_norm.add_(x_RD, layer.ffn(normed_RD, chain_rows), num_chains)
        logits_RV = self._model.output_table.logits(normed_RD, chain_rows)
        in_order_RV = torch.empty_like(logits_RV)
        in_order_RV[order] = logits_RV
        return in_order_RV

    def _attend(
        self, layer: ChainBlock, q_RHD: Tensor, num_chains: int, table_RM: Tensor, context_lens_R: Tensor
    ) -> Tensor:
        q_RKGD = layer.attention.group_by_kv_head(q_RHD, num_chains)
        store = self._store
        out_RKGD = decode_attention(q_RKGD, store.k_pages_BPKD, store.v_pages_BPKD, table_RM, context_lens_R)
        return layer.attention.ungroup(out_RKGD, num_chains)

    def _slot_mapping(self, tables_LRM: Tensor, positions_R: Tensor) -> Tensor:
        """Where the step's tokens are written: slot_mapping_LR, page * P + slot."""
        page_tokens = self._store.layout.page_tokens
        columns_R = positions_R // page_tokens
        rows_R = torch.arange(len(positions_R))
        return tables_LRM[:, rows_R, columns_R].long() * page_tokens + positions_R % page_tokens


def _stack_tables(rows: Sequence[StepInput]) -> Tensor:
    """Page tables of all requests, int32, ragged ends padded with page 0, which nobody reads there."""
    width = max(row.table_LM.shape[1] for row in rows)
    tables = np.zeros((rows[0].table_LM.shape[0], len(rows), width), dtype=np.int32)
    for index, row in enumerate(rows):
        tables[:, index, : row.table_LM.shape[1]] = row.table_LM
    return torch.from_numpy(tables)
