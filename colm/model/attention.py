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
    """All projections are Linear (chain), and no head mixes chains.

    With KV sharing (CoLM-Air) keys and values have chain 1 only, and the queries of every chain read them;
    without (CoLM) the queries of chain i read the keys and values of chain i. Either way query head j of a chain
    reads kv head j // (query heads / kv heads) of those: grouped, so that chain 1 is exactly a LLaMA.
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

    # The next four are the nodes' way: chains side by side in one tensor, keys and values of chain 1 alone.

    def keys_values(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Unrotated (k_RKD, v_RKD) of chain 1's normalised hidden states; other chains' are not read."""
        chain1 = x_RD[:, : self.config.chain_dims[0]]
        shape = (x_RD.shape[0], self.config.chain_kv_heads[0], self.config.head_dim)
        rows = (x_RD.shape[0],)
        return self.wk(chain1, rows).view(shape), self.wv(chain1, rows).view(shape)

    def queries(self, x_RD: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """Unrotated q_RHD of the active chains, chain by chain."""
        q_RH: Tensor = self.wq(x_RD, chain_rows)
        return q_RH.view(x_RD.shape[0], -1, self.config.head_dim)

    def group_by_kv_head(self, q_RHD: Tensor, num_chains: int) -> Tensor:
        """Reorder query heads of all active chains by the shared kv head they read: q_RKGD."""
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

    def by_chain(self, xs: Sequence[Tensor], cos_TD: Tensor, sin_TD: Tensor, num_sequences: int) -> list[Tensor]:
        """Causal self-attention of whole sequences of equal length, one (R, D_i) a chain, differentiable."""
        cos, sin = cos_TD.repeat(num_sequences, 1), sin_TD.repeat(num_sequences, 1)
        head_dim, num_tokens = self.config.head_dim, len(cos_TD)

        def heads(x_R: Tensor) -> Tensor:
            return x_R.view(len(x_R), -1, head_dim)

        def sequences(x_RHD: Tensor) -> Tensor:
            return x_RHD.view(num_sequences, num_tokens, -1, head_dim).transpose(1, 2)

        keys = [sequences(rotate(heads(k), cos, sin)) for k in self.wk.by_chain(xs[: self.kv_chains])]
        values = [sequences(heads(v)) for v in self.wv.by_chain(xs[: self.kv_chains])]
        attended = []
        for chain, q in enumerate(self.wq.by_chain(xs)):
            source = min(chain, self.kv_chains - 1)
            q_BHTD = sequences(rotate(heads(q), cos, sin))
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD, keys[source], values[source], is_causal=True, enable_gqa=True
            )
            attended.append(out_BHTD.transpose(1, 2).reshape(q.shape))
        return self.wo.by_chain(attended)
