"""Attention (chain): the projections, and the oracle's own attention over them.

Shapes: B sequences, T tokens, R = B*T rows, H query heads of the active chains, K kv heads, G query heads per
kv head of the active chains, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm.config import ChainConfig
from colm.model.linear import ChainLinear
from colm.model.rope import rotate


class ChainAttention(nn.Module):
    """Queries and output are Linear (chain); keys and values are plain linears on chain 1, shared by all chains.

    Query head j of chain i reads kv head j // (chains[i] / num_kv_heads): grouped within each chain, so that
    chain 1 is exactly a LLaMA.
    """

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.config = config
        self.wq = ChainLinear(config.chain_dims, config.chain_query_dims)
        self.wk = ChainLinear(config.chain_dims[:1], (config.kv_dim,))
        self.wv = ChainLinear(config.chain_dims[:1], (config.kv_dim,))
        self.wo = ChainLinear(config.chain_query_dims, config.chain_dims)

    def keys_values(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Unrotated (k_RKD, v_RKD) of normalised hidden states, of which chain 1 alone is read."""
        chain1 = x_RD[:, : self.config.chain_dims[0]]
        shape = (x_RD.shape[0], self.config.num_kv_heads, self.config.head_dim)
        rows = (x_RD.shape[0],)
        return self.wk(chain1, rows).view(shape), self.wv(chain1, rows).view(shape)

    def queries(self, x_RD: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """Unrotated q_RHD of the active chains, chain by chain."""
        q_RH: Tensor = self.wq(x_RD, chain_rows)
        return q_RH.view(x_RD.shape[0], -1, self.config.head_dim)

    def group_by_kv_head(self, q_RHD: Tensor, num_chains: int) -> Tensor:
        """Reorder query heads of all active chains by the kv head they read: q_RKGD."""
        num_rows, _, head_dim = q_RHD.shape
        num_kv_heads = self.config.num_kv_heads
        per_chain = q_RHD.split(list(self.config.chains[:num_chains]), dim=1)
        grouped = [q.reshape(num_rows, num_kv_heads, -1, head_dim) for q in per_chain]
        return grouped[0] if num_chains == 1 else torch.cat(grouped, dim=2)

    def ungroup(self, out_RKGD: Tensor, num_chains: int) -> Tensor:
        """Undo `group_by_kv_head` and flatten the heads: chains side by side, ready for `wo`."""
        num_rows, num_kv_heads = out_RKGD.shape[:2]
        groups = [chain // num_kv_heads for chain in self.config.chains[:num_chains]]
        per_chain = [out.reshape(num_rows, -1) for out in out_RKGD.split(groups, dim=2)]
        return per_chain[0] if num_chains == 1 else torch.cat(per_chain, dim=1)

    def forward(self, x_RD: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_sequences: int, num_chains: int) -> Tensor:
        """Causal self-attention of whole sequences of equal length, for the oracle."""
        num_rows = x_RD.shape[0]
        num_tokens = num_rows // num_sequences
        chain_rows = (num_rows,) * num_chains
        cos, sin = cos_TD.repeat(num_sequences, 1), sin_TD.repeat(num_sequences, 1)
        k_RKD, v_RKD = self.keys_values(x_RD)
        q_RKGD = self.group_by_kv_head(rotate(self.queries(x_RD, chain_rows), cos, sin), num_chains)
        group = q_RKGD.shape[2]
        q_BHTD = q_RKGD.flatten(1, 2).unflatten(0, (num_sequences, num_tokens)).transpose(1, 2)
        k_BKTD = rotate(k_RKD, cos, sin).unflatten(0, (num_sequences, num_tokens)).transpose(1, 2)
        v_BKTD = v_RKD.unflatten(0, (num_sequences, num_tokens)).transpose(1, 2)
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)
        out_RKGD = out_BHTD.transpose(1, 2).reshape(num_rows, -1, group, self.config.head_dim)
        result: Tensor = self.wo(self.ungroup(out_RKGD, num_chains), chain_rows)
        return result
