"""Queries, keys and values of chain 1's layers, for what looks at attention itself.

Shapes: N tokens, T tokens of a tile, D model features of chain 1, H query heads of chain 1, K kv heads, E head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.rotary import rotate_, write_kv
from numpy.typing import NDArray
from torch import Tensor

from colm.defaults import TILE_TOKENS
from colm.model import ChainTransformer
from colm.model.rope import inverse_frequencies, rotation


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
    dtype = hidden_ND.dtype
    k_KNE = torch.empty(config.chain_kv_heads[0], num_tokens, config.head_dim, dtype=dtype)
    q_NHE = torch.empty(num_tokens, config.chains[0], config.head_dim, dtype=dtype)
    v_KNE, out_NHE = torch.empty_like(k_KNE), torch.empty_like(q_NHE)
    lse_NH = torch.empty(q_NHE.shape[:2])
    frequencies = inverse_frequencies(config)
    tiles = [slice(start, min(start + TILE_TOKENS, num_tokens)) for start in range(0, num_tokens, TILE_TOKENS)]
    for layer in model.blocks:
        for tile in tiles:
            rows = (tile.stop - tile.start,)
            cos_TE, sin_TE = rotation(frequencies, torch.arange(tile.start, tile.stop))
            normed_TD = layer.attention_norm(hidden_ND[tile], 1)
            k_TKE, v_TKE = layer.attention.keys_values(normed_TD)
            write_kv(k_TKE, v_TKE, cos_TE, sin_TE, *(x_KNE[:, tile].transpose(0, 1) for x_KNE in (k_KNE, v_KNE)))
            q_NHE[tile] = rotate_(layer.attention.queries(normed_TD, rows), cos_TE, sin_TE)
        for tile in tiles:
            keys_values = (k_KNE[:, : tile.stop], v_KNE[:, : tile.stop])
            out_NHE[tile], lse_NH[tile] = prefill_attention(q_NHE[tile], *keys_values)
        yield LayerAttention(q_NHE, k_KNE, v_KNE, out_NHE, lse_NH)
        for tile in tiles:
            rows, x_TD = (tile.stop - tile.start,), hidden_ND[tile]
            x_TD += layer.after_attention(x_TD, out_NHE[tile].flatten(1), rows)
