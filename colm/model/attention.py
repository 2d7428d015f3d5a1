"""Attention (chain): the projections, and the oracle's own attention over them.

Shapes: B sequences, T tokens, R = B*T rows, H query heads of the active chains, K kv heads, G query heads per
kv head of the active chains, D head dim.
"""

from collections.abc import Sequence
from functools import cache

import torch
from colm_kernels.chain_linear import joint_linear
from colm_kernels.rotary import rotate_reference
from colm_kernels.staircase import Staircase
from torch import Tensor, nn
from torch.nn import functional as F

from colm.model.config import ChainConfig
from colm.model.linear import ChainLinear


class ChainAttention(nn.Module):
    """All projections are Linear (chain), and no head mixes chains.

    With KV sharing (CoLM-Air) only chain 1 has keys and values, and the queries of every chain read them.
    Without it (CoLM) the queries of chain i read the keys and values of chain i. Either way query head j of a chain
    reads kv head j // (query heads / kv heads): grouped, so that chain 1 is exactly a LLaMA.
    """

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.config = config
        self.kv_chains = len(config.chain_kv_heads)
        kv_dims = [heads * config.head_dim for heads in config.chain_kv_heads]
        self.wq = ChainLinear(config.chain_dims, config.chain_query_dims, bias=config.bias)
        self.wk = ChainLinear(config.chain_dims[: self.kv_chains], kv_dims, bias=config.bias)
        self.wv = ChainLinear(config.chain_dims[: self.kv_chains], kv_dims, bias=config.bias)
        self.wo = ChainLinear(config.chain_query_dims, config.chain_dims, bias=config.bias)

    # The serving forward uses the next five methods: chains side by side, keys and values of chain 1 only.

    def keys_values(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Unrotated (k_RKD, v_RKD) of chain 1's normalised hidden states; other chains' columns are not read."""
        chain1 = x_RD[:, : self.config.chain_dims[0]]
        rows = (x_RD.shape[0],)
        k_RKD, v_RKD = self._heads_of_each(chain1, [self.wk.operands(rows), self.wv.operands(rows)])
        return k_RKD, v_RKD

    def queries(self, x_RD: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """Unrotated q_RHD of the active chains, chain by chain."""
        q_RH: Tensor = self.wq(x_RD, chain_rows)
        return q_RH.view(x_RD.shape[0], -1, self.config.head_dim)

    def queries_keys_values(self, x_RD: Tensor, chain_rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(q_RHD, k_RKD, v_RKD) as from `queries` and `keys_values`, in one call."""
        rows = (x_RD.shape[0],)
        operands = [self.wq.operands(chain_rows), self.wk.operands(rows), self.wv.operands(rows)]
        q_RHD, k_RKD, v_RKD = self._heads_of_each(x_RD, operands)
        return q_RHD, k_RKD, v_RKD

    def _heads_of_each(self, x_RD: Tensor, staircases: Sequence[Staircase]) -> list[Tensor]:
        return [y.view(len(x_RD), -1, self.config.head_dim) for y in joint_linear(x_RD, staircases)]

    def group_by_kv_head(self, q_RHD: Tensor, num_chains: int) -> Tensor:
        """Reorder query heads of all active chains by the shared kv head they read: q_RKGD."""
        order_H, _ = _head_order(self.config.chains[:num_chains], self.config.num_kv_heads, q_RHD.device)
        ordered_RHD = q_RHD if num_chains == 1 else q_RHD.index_select(1, order_H)
        return ordered_RHD.view(len(q_RHD), self.config.num_kv_heads, -1, self.config.head_dim)

    def ungroup(self, out_RKGD: Tensor, num_chains: int) -> Tensor:
        """Undo `group_by_kv_head` and flatten the heads: chains side by side, ready for `wo`."""
        _, place_H = _head_order(self.config.chains[:num_chains], self.config.num_kv_heads, out_RKGD.device)
        out_RHD = out_RKGD.flatten(1, 2)
        return (out_RHD if num_chains == 1 else out_RHD.index_select(1, place_H)).flatten(1)

    def heads_by_chain(
        self, xs: Sequence[Tensor], cos_RD: Tensor, sin_RD: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The oracle's rotated queries and keys, and its values: (R, heads, D) for each chain that has its own."""

        def heads(x_R: Tensor) -> Tensor:
            return x_R.view(len(x_R), -1, self.config.head_dim)

        of_kv = xs[: self.kv_chains]
        return (
            [rotate_reference(heads(q_R), cos_RD, sin_RD) for q_R in self.wq.by_chain(xs)],
            [rotate_reference(heads(k_R), cos_RD, sin_RD) for k_R in self.wk.by_chain(of_kv)],
            [heads(v_R) for v_R in self.wv.by_chain(of_kv)],
        )

    def by_chain(self, xs: Sequence[Tensor], cos_TD: Tensor, sin_TD: Tensor, num_sequences: int) -> list[Tensor]:
        """The oracle: causal self-attention of whole sequences of equal length, one (R, D_i) a chain, differentiable.

        It must share no code with the serving forward, which is held against it.
        """
        queries, keys, values = self.heads_by_chain(
            xs, cos_TD.repeat(num_sequences, 1), sin_TD.repeat(num_sequences, 1)
        )

        def sequences(x_RHD: Tensor) -> Tensor:
            return x_RHD.view(num_sequences, len(cos_TD), -1, self.config.head_dim).transpose(1, 2)

        attended = []
        for chain, q_RHD in enumerate(queries):
            source = min(chain, self.kv_chains - 1)
            out_BHTD = F.scaled_dot_product_attention(
                sequences(q_RHD), sequences(keys[source]), sequences(values[source]), is_causal=True, enable_gqa=True
            )
            attended.append(out_BHTD.transpose(1, 2).reshape(len(q_RHD), -1))
        return self.wo.by_chain(attended)


@cache
def _head_order(chains: tuple[int, ...], num_kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query heads sorted by the kv head they read, then by chain; and where each head stands in that order."""
    heads = torch.arange(sum(chains), device=device).split(list(chains))
    order_H = torch.cat([chain.view(num_kv_heads, -1) for chain in heads], dim=1).flatten()
    return order_H, order_H.argsort()
