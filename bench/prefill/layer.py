"""One layer of chain 1 over a long prompt, of which any tile can be timed without those before it.

Shapes: N prompt tokens, T tokens of a tile, S keys up to its end, K kv heads, G query heads per kv head, E head dim, D
chain-1 model features.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.rotary import write_kv
from torch import Tensor

from bench.random_weights import RandomWeights
from colm.checkpoint import assign, prefill_tensor_names
from colm.kv import KvFormat
from colm.model import ChainTransformer
from colm.model.block import Rows
from colm.model.config import ChainConfig
from colm.model.rope import Rope
from colm.model.transformer import slice_config
from colm.placement import CPU

_BLOCK_TOKENS = 4096
"""Keys and values are random up to here and repeat then: what attention costs does not depend on them."""


class TileSeconds(NamedTuple):
    """One tile of one layer."""

    keys_values_s: float
    """Norm, keys and values: all that the last layer does."""
    rest_s: float
    """Queries, attention, feed-forward."""


@dataclass(frozen=True, slots=True)
class KeysValues:
    """One layer's of a whole prompt; layers of models with the same heads can share them."""

    k_KNE: Tensor
    v_KNE: Tensor

    @classmethod
    def random(cls, kv_format: KvFormat, num_tokens: int, seed: int) -> "KeysValues":
        """Every page of them written, as a prefill that came so far has."""
        generator = torch.Generator().manual_seed(seed)
        shape = (kv_format.num_kv_heads, num_tokens, kv_format.head_dim)
        k_KNE, v_KNE = (torch.empty(shape, dtype=kv_format.dtype) for _ in range(2))
        for whole in (k_KNE, v_KNE):
            block = whole[:, :_BLOCK_TOKENS].normal_(generator=generator)
            for start in range(_BLOCK_TOKENS, num_tokens, _BLOCK_TOKENS):
                part = whole[:, start : start + _BLOCK_TOKENS]
                part.copy_(block[:, : part.shape[1]])
        return cls(k_KNE, v_KNE)


@dataclass(frozen=True, slots=True)
class _Cache:
    """A `LayerCache` in which one tile writes its own part and reads all up to its end."""

    held: KeysValues
    start: int
    stop: int

    def write(self, k_TKE: Tensor, v_TKE: Tensor, rows: Rows) -> None:
        into = [each[:, self.start : self.stop].transpose(0, 1) for each in (self.held.k_KNE, self.held.v_KNE)]
        write_kv(k_TKE, v_TKE, rows.cos_RE, rows.sin_RE, *into)

    def attend(self, q_TKGE: Tensor) -> Tensor:
        k_KSE, v_KSE = self.held.k_KNE[:, : self.stop], self.held.v_KNE[:, : self.stop]
        out_THE, _ = prefill_attention(q_TKGE.flatten(1, 2), k_KSE, v_KSE)
        return out_THE.view_as(q_TKGE)


class SampledLayer:
    """A whole layer with random weights, timed tile by tile as `PrefillEngine.run` steps through it.

    Args:
        config: the model; only chain 1 of one of its layers is made.
        dtype: of weights and computation.
        held: keys and values of the whole prompt.
        tile_tokens: of the engine.
        seed: of weights and hidden states.
        clock: in seconds.
    """

    def __init__(
        self,
        config: ChainConfig,
        dtype: torch.dtype,
        held: KeysValues,
        *,
        tile_tokens: int,
        seed: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        # The first of two layers is a whole one; no embedding is looked up.
        config = replace(config, num_layers=2, vocab_size=1)
        weights = RandomWeights(config=config, dtype=dtype, seed=seed)
        with torch.device("meta"):
            model = ChainTransformer(config, 1)
        assign(model, weights.tensors(prefill_tensor_names(config)), dtype)
        self._block, self._rope, self._held, self._clock = model.blocks[0], Rope(config, CPU), held, clock
        self._tile_tokens = tile_tokens
        generator = torch.Generator().manual_seed(seed)
        shape = (tile_tokens, slice_config(config, 1).dim)
        self._source_TD = torch.empty(shape, dtype=dtype).normal_(generator=generator)
        self._x_TD = torch.empty_like(self._source_TD)

    @torch.inference_mode()
    def time(self, start: int, stop: int) -> TileSeconds:
        """Run the tile of tokens [start, stop)."""
        x_TD = self._x_TD[: stop - start]
        x_TD.copy_(self._source_TD[: stop - start])  # else it would grow from turn to turn
        began_s = self._clock()
        rows = Rows((stop - start,), *self._rope.tables(torch.arange(start, stop)))
        cache = _Cache(self._held, start, stop)
        normed_TD = self._block.attention_norm(x_TD, 1)
        self._block.write_keys_values(normed_TD, rows, cache)
        between_s = self._clock()
        x_TD += self._block.attend(x_TD, normed_TD, rows, cache)
        return TileSeconds(between_s - began_s, self._clock() - between_s)
