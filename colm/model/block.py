"""One pre-norm transformer layer: as the oracle runs it, and as every node serves it.

Shapes: R rows, D model features, H query heads and G query heads per kv head of the active chains, K kv heads, E head
dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from colm_kernels.rotary import rotate_
from torch import Tensor, nn

from colm.model.attention import ChainAttention
from colm.model.config import ChainConfig
from colm.model.ffn import ChainFFN
from colm.model.norm import ChainRMSNorm


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that a layer runs: how many at each scale, and their rotation."""

    chain_rows: Sequence[int]
    """For each active chain, how many of the leading rows run it."""
    cos_RE: Tensor
    """Of `colm.model.rope.rotation` at the rows' positions."""
    sin_RE: Tensor
    """Likewise."""


class LayerCache(Protocol):
    """The KV cache of one layer, as a block writes and reads it."""

    def write(self, k_RKE: Tensor, v_RKE: Tensor, rows: Rows) -> None:
        """Store the rows' keys, rotated on the way, and their values as they are."""

    def attend(self, q_RKGE: Tensor) -> Tensor:
        """Attend each row's rotated queries to the cache; returns out_RKGE, contiguous."""


class ChainBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    `by_chain` is the oracle. The other methods are the serving forward: chains side by side, without gradients. `step`
    runs the whole layer. `write_keys_values` and `attend` are its halves, for a caller that sends the keys and values
    off in between.

    The caller applies `attention_norm` to x before, and adds what comes back to x after. Where another layer follows at
    once, that layer's norm does both in one pass.
    """

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.attention_norm = ChainRMSNorm(config.chain_dims, config.norm_eps)
        self.attention = ChainAttention(config)
        self.ffn_norm = ChainRMSNorm(config.chain_dims, config.norm_eps)
        self.ffn = ChainFFN(config)

    def step(self, x_RD: Tensor, normed_RD: Tensor, rows: Rows, cache: LayerCache) -> Tensor:
        """The whole layer; see `attend` for arguments and result."""
        # One product for all three: few rows are bounded by what a call costs and by reading the weights.
        q_RHE, k_RKE, v_RKE = self.attention.queries_keys_values(normed_RD, rows.chain_rows)
        cache.write(k_RKE, v_RKE, rows)
        return self._after_queries(x_RD, q_RHE, rows, cache)

    def write_keys_values(self, normed_RD: Tensor, rows: Rows, cache: LayerCache) -> None:
        """The first half: write the rows' keys and values; their queries are not needed for it."""
        cache.write(*self.attention.keys_values(normed_RD), rows)

    def attend(self, x_RD: Tensor, normed_RD: Tensor, rows: Rows, cache: LayerCache) -> Tensor:
        """The second half, once the cache holds all that the queries read.

        Args:
            x_RD: the residual stream, chains side by side; the attention's part is added in place.
            normed_RD: x after `attention_norm`.
            rows: how many run each chain, and their rotation tables.
            cache: this layer's.

        Returns:
            The feed-forward's part, still to be added to x.
        """
        return self._after_queries(x_RD, self.attention.queries(normed_RD, rows.chain_rows), rows, cache)

    def _after_queries(self, x_RD: Tensor, q_RHE: Tensor, rows: Rows, cache: LayerCache) -> Tensor:
        num_chains = len(rows.chain_rows)
        q_RKGE = self.attention.group_by_kv_head(rotate_(q_RHE, rows.cos_RE, rows.sin_RE), num_chains)
        attended_RH = self.attention.ungroup(cache.attend(q_RKGE), num_chains)
        normed_RD = self.ffn_norm.add_(x_RD, self.attention.wo(attended_RH, rows.chain_rows), num_chains)
        out_RD: Tensor = self.ffn(normed_RD, rows.chain_rows)
        return out_RD

    def by_chain(self, xs: Sequence[Tensor], cos_TE: Tensor, sin_TE: Tensor, num_sequences: int) -> list[Tensor]:
        """Run the oracle's layer: one tensor a chain, differentiable, sharing no code with the serving forward."""
        attended = self.attention.by_chain(self.attention_norm.by_chain(xs), cos_TE, sin_TE, num_sequences)
        xs = [x + out for x, out in zip(xs, attended, strict=True)]
        outputs = self.ffn.by_chain(self.ffn_norm.by_chain(xs))
        return [x + out for x, out in zip(xs, outputs, strict=True)]
