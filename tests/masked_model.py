"""The paper's formulas, implemented a second time from the definitions, with masks where `colm.model` has blocks.

Everything runs at full width; a feature that a chain may not see is multiplied by zero. Only the names of the tensors
are those of `colm.model`.

Shapes: T tokens, D model features, O and I output and input features of a linear, H query heads, E head dim.
"""

import math

import torch
from torch import Tensor

from colm.model.config import ChainConfig


def owners(width: int, chains: tuple[int, ...]) -> Tensor:
    """For each feature of a width, the chain (from 0) that owns it."""
    total = sum(chains)
    return torch.cat([torch.full((width * chain // total,), index) for index, chain in enumerate(chains)])


class MaskedModel:
    """One sequence at a time, any scale, in the dtype of the weights given.

    Args:
        config: the model's shape, with rope without scaling.
        tensors: a checkpoint's tensors.
    """

    def __init__(self, config: ChainConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        self.dtype = tensors["embedding.chain1"].dtype
        self.dim_owner = owners(config.dim, config.chains)
        self.head_owner = owners(config.num_heads, config.chains)

    def logits(self, tokens_T: Tensor, num_chains: int) -> Tensor:
        """logits_TV of scale `num_chains`."""
        config = self.config
        # Scale i is the whole model in which no feature beyond chain i ever has a value.
        self.visible_D = (self.dim_owner < num_chains).to(self.dtype)
        x_TD = self.table("embedding")[tokens_T] * self.visible_D
        for layer in range(config.num_layers):
            prefix = f"layers.{layer}."
            x_TD = x_TD + self.attention(prefix + "attention.", self.norm(prefix + "attention_norm", x_TD))
            x_TD = x_TD * self.visible_D
            x_TD = x_TD + self.ffn(prefix + "ffn.", self.norm(prefix + "ffn_norm", x_TD))
            x_TD = x_TD * self.visible_D
        head = self.table("embedding" if config.tie_embeddings else "head")
        return (self.norm("final_norm", x_TD) * self.visible_D) @ head.T

    def table(self, name: str) -> Tensor:
        return torch.cat([self.tensors[f"{name}.chain{i + 1}"] for i in range(self.config.num_chains)], dim=1)

    def norm(self, name: str, x_TD: Tensor) -> Tensor:
        """Normalise each chain by its own root mean square, with a matrix that averages over the chain's features."""
        gain_D = torch.cat([self.tensors[f"{name}.chain{i + 1}"] for i in range(self.config.num_chains)])
        same = (self.dim_owner[:, None] == self.dim_owner[None, :]).to(torch.promote_types(x_TD.dtype, torch.float32))
        wide = x_TD.to(same.dtype)
        mean_square = wide.square() @ (same / same.sum(dim=0))
        return (wide / torch.sqrt(mean_square + self.config.norm_eps)).to(x_TD.dtype) * gain_D

    def linear(self, name: str, x_TI: Tensor, in_owner: Tensor, out_owner: Tensor) -> Tensor:
        """Apply a full matrix under the mask that lets output chain i read input chains up to i."""
        full_OI = torch.zeros(len(out_owner), len(in_owner), dtype=x_TI.dtype)
        bias_O = torch.zeros(len(out_owner), dtype=x_TI.dtype)
        for chain in range(int(out_owner.max()) + 1):
            block = self.tensors[f"{name}.chain{chain + 1}"]
            full_OI[out_owner == chain, : block.shape[1]] = block
            if self.config.bias:
                bias_O[out_owner == chain] = self.tensors[f"{name}.chain{chain + 1}_bias"]
        mask_OI = (out_owner[:, None] >= in_owner[None, :]).to(x_TI.dtype)
        return x_TI @ (full_OI * mask_OI).T + bias_O

    def attention(self, prefix: str, x_TD: Tensor) -> Tensor:
        config, head_dim, num_tokens = self.config, self.config.head_dim, len(x_TD)
        query_owner = self.head_owner.repeat_interleave(head_dim)
        if config.kv_sharing:
            kv_owner = torch.zeros(config.num_kv_heads * head_dim, dtype=torch.long)
            in_owner = self.dim_owner[self.dim_owner == 0]
            x_kv = x_TD[:, : len(in_owner)]
        else:
            kv_owner = owners(config.num_kv_heads, config.chains).repeat_interleave(head_dim)
            in_owner, x_kv = self.dim_owner, x_TD
        q = self.rotate(self.linear(prefix + "wq", x_TD, self.dim_owner, query_owner).view(num_tokens, -1, head_dim))
        k = self.rotate(self.linear(prefix + "wk", x_kv, in_owner, kv_owner).view(num_tokens, -1, head_dim))
        v = self.linear(prefix + "wv", x_kv, in_owner, kv_owner).view(num_tokens, -1, head_dim)
        read = torch.tensor([self.kv_head_of(head) for head in range(config.num_heads)])
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        scores_HTT = torch.einsum("thd,shd->hts", q.to(wide), k[:, read].to(wide)) / math.sqrt(head_dim)
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        weights_HTT = scores_HTT.masked_fill(future, -math.inf).softmax(dim=-1)
        out = torch.einsum("hts,shd->thd", weights_HTT, v[:, read].to(wide)).to(x_TD.dtype)
        return self.linear(prefix + "wo", out.reshape(num_tokens, -1), query_owner, self.dim_owner)

    def kv_head_of(self, head: int) -> int:
        """The kv head of a query head: grouped within the chain with KV sharing, over the whole layer without."""
        config = self.config
        if not config.kv_sharing:
            return head // (config.num_heads // config.num_kv_heads)
        chain = int(self.head_owner[head])
        return (head - sum(config.chains[:chain])) // (config.chains[chain] // config.num_kv_heads)

    def rotate(self, x_THE: Tensor) -> Tensor:
        """Rotate each pair of features (j, j + E/2), as a complex number, by its token's angle."""
        half = self.config.head_dim // 2
        wide = torch.promote_types(x_THE.dtype, torch.float32)
        steps = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(len(x_THE), dtype=torch.float64)[:, None] * steps
        turned = torch.complex(x_THE[..., :half].to(wide), x_THE[..., half:].to(wide))
        turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None].to(turned.dtype)
        return torch.cat((turned.real, turned.imag), dim=-1).to(x_THE.dtype)

    def ffn(self, prefix: str, x_TD: Tensor) -> Tensor:
        hidden_owner = owners(self.config.hidden_dim, self.config.chains)
        up = self.linear(prefix + "up", x_TD, self.dim_owner, hidden_owner)
        if self.config.activation == "swiglu":
            gate = self.linear(prefix + "gate", x_TD, self.dim_owner, hidden_owner)
            hidden = gate / (1 + torch.exp(-gate)) * up
        else:
            hidden = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
        return self.linear(prefix + "down", hidden, hidden_owner, self.dim_owner)
