"""Chain 1 over a prompt, layer by layer, tile by tile.

Shapes: N prompt tokens, T tokens of a tile, D chain-1 model features, H chain-1 query heads, K kv heads, E head dim.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.rotary import rotate_, write_kv
from numpy.typing import NDArray

from colm.checkpoint import WeightSource, assign, prefill_tensor_names
from colm.errors import InvalidRequest
from colm.kv import KvFormat, KvTile, require_shared_kv
from colm.model import ChainTransformer
from colm.model.rope import inverse_frequencies, rotation


class PrefillEngine:
    """Holds chain 1's weights and, while it works, one layer's keys and values and the hidden states.

    Args:
        source: only the tensors that a prefill needs are read from it.
        kv_format: what the keys and values shall be; its dtype is also that of the computation.
        tile_tokens: tokens computed and sent at a time.
    """

    def __init__(self, source: WeightSource, kv_format: KvFormat, *, tile_tokens: int) -> None:
        if tile_tokens < 1:
            raise ValueError(f"tile_tokens={tile_tokens} must be at least 1")
        require_shared_kv(source.config)
        self.config = source.config
        self.kv_format = kv_format
        self.tile_tokens = tile_tokens
        with torch.device("meta"):
            self._model = ChainTransformer(source.config, 1)
        assign(self._model, source.tensors(prefill_tensor_names(source.config)), kv_format.dtype)
        self._inverse_frequencies = inverse_frequencies(source.config)

    @torch.inference_mode()
    def run(
        self, token_ids: NDArray[np.int64], *, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[KvTile]:
        """Compute the keys and values of every token.

        Tiles come layer by layer, in token order. A tile's tensors are views that the next layer overwrites: use
        or copy them before asking for the next tile. Dropping the iterator stops the work.

        Args:
            token_ids: the prompt.
            is_cancelled: looked at between a tile's operations; once it says so, no tile follows.

        Raises:
            InvalidRequest: no tokens, more than the model's context, or an id outside the vocabulary.
        """
        self.check(token_ids)
        num_tokens = len(token_ids)
        kv_format = self.kv_format
        hidden_ND = self._model.embedding.embed(torch.from_numpy(token_ids), 1)
        k_KNE = torch.empty(kv_format.num_kv_heads, num_tokens, kv_format.head_dim, dtype=kv_format.dtype)
        v_KNE = torch.empty_like(k_KNE)
        for index, layer in enumerate(self._model.blocks):
            is_last = index == kv_format.num_layers - 1
            for start in range(0, num_tokens, self.tile_tokens):
                stop = min(start + self.tile_tokens, num_tokens)
                x_TD, rows = hidden_ND[start:stop], (stop - start,)
                # Made anew for each tile and layer: kept for a million tokens, the tables would be as large as a
                # layer's keys, and they are a small part of the work.
                cos_TE, sin_TE = rotation(self._inverse_frequencies, torch.arange(start, stop))
                normed_TD = layer.attention_norm(x_TD, 1)
                k_TKE, v_TKE = layer.attention.keys_values(normed_TD)
                k_KTE, v_KTE = k_KNE[:, start:stop], v_KNE[:, start:stop]
                write_kv(k_TKE, v_TKE, cos_TE, sin_TE, k_KTE.transpose(0, 1), v_KTE.transpose(0, 1))
                yield KvTile(index, start, k_KTE, v_KTE)
                if is_cancelled():
                    return
                # The last layer's output would only feed the head, which is the decode node's work.
                if not is_last:
                    q_THE = rotate_(layer.attention.queries(normed_TD, rows), cos_TE, sin_TE)
                    out_THE, _ = prefill_attention(q_THE, k_KNE[:, :stop], v_KNE[:, :stop])
                    if is_cancelled():
                        return
                    x_TD += layer.after_attention(x_TD, out_THE.flatten(1), rows)
                    if is_cancelled():
                        return

    def check(self, token_ids: NDArray[np.int64]) -> None:
        """Refuse a prompt that this model cannot read."""
        if not 1 <= len(token_ids) <= self.config.max_context:
            raise InvalidRequest("num_tokens", len(token_ids), f"must be between 1 and {self.config.max_context}")
        if (worst := int(token_ids.max())) >= self.config.vocab_size or (worst := int(token_ids.min())) < 0:
            raise InvalidRequest("token_ids", worst, f"must be below the vocabulary size {self.config.vocab_size}")
