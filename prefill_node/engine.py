"""Chain 1 over a prompt, layer by layer, tile by tile.

Shapes: N prompt tokens, T tokens of a tile, S keys up to its end, D chain-1 model features, H chain-1 query heads, K kv
heads, E head dim, X rows anywhere.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from colm_kernels.native import CancelFlag
from colm_kernels.prefill_attention import Backend, prefill_attention
from colm_kernels.rotary import rotate_
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import WeightSource, assign, prefill_tensor_names
from colm.errors import InvalidRequest
from colm.kv import KvFormat, KvTile, require_shared_kv
from colm.model import ChainTransformer
from colm.model.block import ChainBlock, Rows
from colm.model.rope import Rope
from colm.placement import CPU
from prefill_node.memory import run_bytes
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.policy import ROW_BLOCK
from prefill_node.sparse.prompt_plans import PromptPlans
from prefill_node.tile_cache import TileCache


class PrefillEngine:
    """Holds chain 1's weights and, while it works, one layer's keys and values and the hidden states.

    Args:
        source: only the tensors that a prefill needs are read from it.
        kv_format: what the keys and values shall be; its dtype is also that of the computation.
        tile_tokens: tokens computed and sent at a time.
        device: where weights, hidden states, keys and values lie.
        attention_backend: what attends to the prompt so far, on CUDA.
    """

    def __init__(
        self,
        source: WeightSource,
        kv_format: KvFormat,
        *,
        tile_tokens: int,
        device: torch.device = CPU,
        attention_backend: Backend = "auto",
    ) -> None:
        if tile_tokens < 1:
            raise ValueError(f"tile_tokens={tile_tokens} must be at least 1")
        require_shared_kv(source.config)
        self.config = source.config
        self.kv_format = kv_format
        self.tile_tokens = tile_tokens
        self._device = device
        self._attention_backend = attention_backend
        with torch.device("meta"):
            self._model = ChainTransformer(source.config, 1)
        assign(self._model, source.tensors(prefill_tensor_names(source.config)), kv_format.dtype, device)
        self._rope = Rope(source.config, device)

    @torch.inference_mode()
    def run(
        self,
        token_ids: NDArray[np.int64],
        *,
        sparse: PromptPlans | None = None,
        cancelled: CancelFlag | None = None,
    ) -> Iterator[KvTile]:
        """Compute the keys and values of every token.

        Tiles come layer by layer, in token order. A tile's tensors are views that the next layer overwrites: use
        or copy them before asking for the next tile. A sparse layer is planned when all its keys and values are there;
        its attention then follows tile by tile, and each step of it brings a tile without tokens, which says only that
        there is more to do. Dropping the iterator stops the work.

        Args:
            token_ids: the prompt.
            sparse: plans the prompt's attention, layer by layer; tiles are then whole row blocks. None attends to
                everything.
            cancelled: looked at inside attention and plans, and between a tile's operations; once it is set, no tile
                follows.

        Raises:
            InvalidRequest: no tokens, more than the model's context, or an id outside the vocabulary.
            Cancelled: `cancelled` was set before the end.
        """
        self.check(token_ids)
        cancelled = cancelled or CancelFlag()
        num_tokens = len(token_ids)
        kv_format, device = self.kv_format, self._device
        hidden_ND = self._model.embedding.embed(torch.from_numpy(token_ids).to(device), 1)
        shape = (kv_format.num_kv_heads, num_tokens, kv_format.head_dim)
        k_KNE = torch.empty(shape, dtype=kv_format.dtype, device=device)
        v_KNE = torch.empty_like(k_KNE)
        step = self.tile_tokens if sparse is None else max(1, self.tile_tokens // ROW_BLOCK) * ROW_BLOCK
        tiles = [(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]
        dense = partial(self._dense, cancelled=cancelled)
        for index, layer in enumerate(self._model.blocks):
            # The last layer's output would only feed the head, which is the decode node's work.
            is_last = index == kv_format.num_layers - 1
            is_planned = not is_last and sparse is not None and sparse.covers(index, num_tokens)
            for start, stop in tiles:
                rows, x_TD = self._rows(start, stop), hidden_ND[start:stop]
                cache = TileCache(k_KNE, v_KNE, start, stop, dense)
                normed_TD = layer.attention_norm(x_TD, 1)
                layer.write_keys_values(normed_TD, rows, cache)
                # Before attention: the wire has them while the tile's larger half is still computed.
                yield KvTile(index, start, k_KNE[:, start:stop], v_KNE[:, start:stop])
                cancelled.raise_if_set()
                if not (is_last or is_planned):
                    x_TD += layer.attend(x_TD, normed_TD, rows, cache)
                    cancelled.raise_if_set()
            if sparse is not None and is_planned:
                queries_of = partial(self._queries, layer, hidden_ND)
                plan = sparse.plan(index, queries_of, k_KNE, cancelled=cancelled)
                attention = dense if plan is None else partial(_sparse, plan=plan, cancelled=cancelled)
                for start, stop in tiles:
                    # Others may have the engine between two tiles of a layer, as they have between dense ones.
                    yield KvTile(index + 1, 0, k_KNE[:, :0], v_KNE[:, :0])
                    cancelled.raise_if_set()
                    cache, x_TD = TileCache(k_KNE, v_KNE, start, stop, attention), hidden_ND[start:stop]
                    # Computed twice: kept for all tiles, these rows would be as large as the hidden states.
                    x_TD += layer.attend(x_TD, layer.attention_norm(x_TD, 1), self._rows(start, stop), cache)
                    cancelled.raise_if_set()

    def _rows(self, start: int, stop: int) -> Rows:
        return Rows((stop - start,), *self._rope.range(start, stop))

    def _queries(self, layer: ChainBlock, hidden_ND: Tensor, position_X: Tensor) -> Tensor:
        """q_XHE of any positions, rotated."""
        position_X = position_X.to(self._device)
        normed_XD = layer.attention_norm(hidden_ND[position_X], 1)
        q_XHE = layer.attention.queries(normed_XD, (len(position_X),))
        return rotate_(q_XHE, *self._rope.tables(position_X))

    def _dense(self, q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor, *, cancelled: CancelFlag) -> Tensor:
        out_THE, _ = prefill_attention(q_THE, k_KSE, v_KSE, backend=self._attention_backend, cancelled=cancelled)
        cancelled.raise_if_set()
        return out_THE

    @torch.inference_mode()
    def probe_attention(self, *, num_queries: int, num_keys: int) -> None:
        """Attend once as `run` does with a tile's queries over a prompt so far, of ones; for its time."""
        kv_format = self.kv_format
        shapes = [(num_queries, self.config.chains[0], kv_format.head_dim)]
        shapes += 2 * [(kv_format.num_kv_heads, num_keys, kv_format.head_dim)]
        q_THE, k_KSE, v_KSE = (torch.ones(shape, dtype=kv_format.dtype, device=self._device) for shape in shapes)
        out_THE, _ = prefill_attention(q_THE, k_KSE, v_KSE, backend=self._attention_backend)
        out_THE.cpu()

    def memory_bytes(self, num_tokens: int) -> int:
        """Predicted peak of a `run` over so many tokens, beside the weights; see `prefill_node.memory`."""
        return run_bytes(self.config, self.kv_format.dtype, num_tokens=num_tokens, tile_tokens=self.tile_tokens)

    def check(self, token_ids: NDArray[np.int64]) -> None:
        """Refuse a prompt that this model cannot read."""
        if not 1 <= len(token_ids) <= self.config.max_context:
            raise InvalidRequest("num_tokens", len(token_ids), f"must be between 1 and {self.config.max_context}")
        if (worst := int(token_ids.max())) >= self.config.vocab_size or (worst := int(token_ids.min())) < 0:
            raise InvalidRequest("token_ids", worst, f"must be below the vocabulary size {self.config.vocab_size}")


def _sparse(q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor, *, plan: LayerPlan, cancelled: CancelFlag) -> Tensor:
    index = plan.index(k_KSE.shape[1] - len(q_THE), q_THE)
    out_THE, _ = sparse_prefill_attention(q_THE, k_KSE, v_KSE, index, cancelled=cancelled)
    cancelled.raise_if_set()
    return out_THE
