"""Queries, keys and values of chain 1's layers, for what looks at attention itself.

Shapes: N tokens, T tokens of a tile, S keys up to its end, D model features of chain 1, H query heads of chain 1, K kv
heads, E head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from colm_kernels.prefill_attention import prefill_attention
from numpy.typing import NDArray
from torch import Tensor

from colm.defaults import TILE_TOKENS
from colm.model import ChainTransformer
from colm.model.block import Rows
from colm.model.rope import Rope
from prefill_node.tile_cache import TileCache


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Dense attention of one layer over a whole text, heads rotated."""

    q_NHE: Tensor
    k_KNE: Tensor
    v_KNE: Tensor
    out_NHE: Tensor
    lse_NH: Tensor


@torch.inference_mode()
def layer_attentions(model: ChainTransformer, token_ids: NDArray[np.int64]) -> Iterator[LayerAttention]:
    """Attention of every layer, the last one too, in order.

    Holds one layer's tensors; the next layer overwrites them.

    Args:
        model: chain 1, or a model of which chain 1 is run.
        token_ids: the text.
    """
    config, num_tokens = model.config, len(token_ids)
    hidden_ND = model.embedding.embed(torch.from_numpy(token_ids), 1)
    q_NHE = hidden_ND.new_empty(num_tokens, config.chains[0], config.head_dim)
    k_KNE = hidden_ND.new_empty(config.chain_kv_heads[0], num_tokens, config.head_dim)
    lse_NH = torch.empty(q_NHE.shape[:2])
    attention = LayerAttention(q_NHE, k_KNE, torch.empty_like(k_KNE), torch.empty_like(q_NHE), lse_NH)
    rope = Rope(config)
    tiles = [slice(start, min(start + TILE_TOKENS, num_tokens)) for start in range(0, num_tokens, TILE_TOKENS)]
    for layer in model.blocks:
        for tile in tiles:
            rows = Rows((tile.stop - tile.start,), *rope.range(tile.start, tile.stop))
            cache = TileCache(k_KNE, attention.v_KNE, tile.start, tile.stop, partial(_record, attention, tile))
            x_TD = hidden_ND[tile]
            normed_TD = layer.attention_norm(x_TD, 1)
            layer.write_keys_values(normed_TD, rows, cache)
            x_TD += layer.attend(x_TD, normed_TD, rows, cache)
        yield attention


def _record(attention: LayerAttention, tile: slice, q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor) -> Tensor:
    """Dense attention of a tile, kept."""
    attention.q_NHE[tile] = q_THE
    attention.out_NHE[tile], attention.lse_NH[tile] = prefill_attention(q_THE, k_KSE, v_KSE)
    return attention.out_NHE[tile]
