"""One layer of chain 1 over a long prompt, of which any tile can be timed without those before it.

Shapes: N prompt tokens, T tokens of a tile, S keys up to its end, K kv heads, H query heads, E head dim, D chain-1
model features, X rows anywhere.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.rotary import rotate_
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from colm_kernels.steps import all_at_once
from torch import Tensor

from bench.random_weights import RandomWeights
from colm.checkpoint import assign, prefill_tensor_names
from colm.kv import KvFormat
from colm.model import ChainTransformer
from colm.model.block import ChainBlock, Rows
from colm.model.config import ChainConfig
from colm.model.rope import KEPT_POSITIONS, Rope
from colm.model.transformer import slice_config
from colm.placement import CPU
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.prompt_plans import PromptPlans
from prefill_node.tile_cache import TileCache

_BLOCK_TOKENS = 4096
"""Keys and values are random up to here and repeat then, each block turned by a step of its own: what dense attention
costs does not depend on them, and what is listed of them lies anywhere."""


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
                turned = int(torch.randint(_BLOCK_TOKENS, (), generator=generator))
                part.copy_(block.roll(turned, dims=1)[:, : part.shape[1]])
        return cls(k_KNE, v_KNE)


def block_of(config: ChainConfig, dtype: torch.dtype, seed: int) -> ChainBlock:
    """One layer of chain 1 with random weights; all layers are the same."""
    # The first of two layers is a whole one; no embedding is looked up.
    config = replace(config, num_layers=2, vocab_size=1)
    weights = RandomWeights(config=config, dtype=dtype, seed=seed)
    with torch.device("meta"):
        model = ChainTransformer(config, 1)
    assign(model, weights.tensors(prefill_tensor_names(config)), dtype)
    return model.blocks[0]


class SampledLayer:
    """A whole layer with random weights, timed tile by tile as `PrefillEngine.run` steps through it.

    Args:
        config: the model; only chain 1 of one of its layers is made.
        dtype: of weights and computation.
        held: keys and values of the whole prompt.
        tile_tokens: of the engine; of a sparse layer whole row blocks.
        seed: of weights and hidden states.
        block: of `block_of`, where there is one already.
        plans: makes what plans a prompt's sparse attention; None attends to everything.
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
        block: ChainBlock | None = None,
        plans: Callable[[], PromptPlans] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._block = block_of(config, dtype, seed) if block is None else block
        self._rope, self._held, self._plans, self._clock = Rope(config, CPU), held, plans, clock
        self._plan: LayerPlan | None = None
        # A run finds the tables that all but its first layer have left.
        self._rope.range(0, min(held.k_KNE.shape[1], KEPT_POSITIONS))
        generator = torch.Generator().manual_seed(seed)
        shape = (tile_tokens, slice_config(config, 1).dim)
        self._source_TD = torch.empty(shape, dtype=dtype).normal_(generator=generator)
        self._x_TD = torch.empty_like(self._source_TD)

    @torch.inference_mode()
    def plan(self) -> float:
        """Plan the layer as for a new prompt; returns the seconds, none for a dense layer."""
        if self._plans is None:
            return 0.0
        began_s = self._clock()
        self._plan = all_at_once(self._plans().plan(0, self._queries, self._held.k_KNE))
        return self._clock() - began_s

    @torch.inference_mode()
    def time(self, start: int, stop: int) -> TileSeconds:
        """Run the tile of tokens [start, stop); of a sparse layer after `plan`."""
        x_TD = self._x_TD[: stop - start]
        x_TD.copy_(self._source_TD[: stop - start])  # else it would grow from turn to turn
        began_s = self._clock()
        rows, normed_TD, cache = self._tile(x_TD, start, stop)
        self._block.write_keys_values(normed_TD, rows, cache)
        between_s = self._clock()
        if self._plans is not None:  # its attention is a pass of its own, which has only x of the first
            rows, normed_TD, cache = self._tile(x_TD, start, stop)
        x_TD += self._block.attend(x_TD, normed_TD, rows, cache)
        return TileSeconds(between_s - began_s, self._clock() - between_s)

    def _tile(self, x_TD: Tensor, start: int, stop: int) -> tuple[Rows, Tensor, TileCache]:
        rows = Rows((stop - start,), *self._rope.range(start, stop))
        attention = _dense if self._plan is None else partial(_sparse, self._plan)
        cache = TileCache(self._held.k_KNE, self._held.v_KNE, start, stop, attention)
        return rows, self._block.attention_norm(x_TD, 1), cache

    def _queries(self, position_X: Tensor) -> Tensor:
        normed_XD = self._block.attention_norm(self._source_TD[position_X % len(self._source_TD)], 1)
        q_XHE = self._block.attention.queries(normed_XD, (len(position_X),))
        return rotate_(q_XHE, *self._rope.tables(position_X))


def _dense(q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor) -> Tensor:
    out_THE, _ = prefill_attention(q_THE, k_KSE, v_KSE)
    return out_THE


def _sparse(plan: LayerPlan, q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor) -> Tensor:
    out_THE, _ = sparse_prefill_attention(q_THE, k_KSE, v_KSE, plan.index(k_KSE.shape[1] - len(q_THE), q_THE))
    return out_THE
