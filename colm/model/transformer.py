"""ChainTransformer: LLaMA (one chain) and CoLM-Air (several chains over one set of keys and values).

Shapes: B sequences, T tokens, R = B*T rows, D model features of the active chains, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from colm.config import ChainConfig
from colm.errors import UnsupportedModel
from colm.model.attention import ChainAttention
from colm.model.embedding import ChainTable
from colm.model.ffn import ChainSwiGLU
from colm.model.norm import ChainRMSNorm
from colm.model.rope import inverse_frequencies, rotation


class ChainBlock(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.attention_norm = ChainRMSNorm(config.chain_dims, config.norm_eps)
        self.attention = ChainAttention(config)
        self.ffn_norm = ChainRMSNorm(config.chain_dims, config.norm_eps)
        self.ffn = ChainSwiGLU(config)

    def forward(self, x_RD: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_sequences: int, num_chains: int) -> Tensor:
        """Attention and feed-forward, each added to the residual stream."""
        chain_rows = (x_RD.shape[0],) * num_chains
        x_RD = x_RD + self.attention(self.attention_norm(x_RD, num_chains), cos_TD, sin_TD, num_sequences, num_chains)
        result: Tensor = x_RD + self.ffn(self.ffn_norm(x_RD, num_chains), chain_rows)
        return result


class ChainTransformer(nn.Module):
    """The whole model in plain PyTorch. Parameter names are the checkpoint's tensor names.

    Args:
        config: shape of the whole model.
        num_chains: chains to build; None for all. The rest of the model does not exist in memory.

    Raises:
        UnsupportedModel: several chains without KV sharing.
    """

    def __init__(self, config: ChainConfig, num_chains: int | None = None) -> None:
        super().__init__()
        if config.num_chains > 1 and not config.kv_sharing:
            raise UnsupportedModel("kv_sharing=False with several chains is not supported yet; use kv_sharing=True")
        self.config = config
        self.num_chains = config.resolve_num_chains(num_chains)
        built = slice_config(config, self.num_chains)
        self.embedding = ChainTable(config.vocab_size, built.chain_dims)
        self.layers = nn.ModuleList(ChainBlock(built) for _ in range(config.num_layers))
        self.final_norm = ChainRMSNorm(built.chain_dims, config.norm_eps)
        if not config.tie_embeddings:
            self.head = ChainTable(config.vocab_size, built.chain_dims)

    @property
    def blocks(self) -> Sequence[ChainBlock]:
        """The layers, with their type."""
        return cast("Sequence[ChainBlock]", self.layers)

    @property
    def output_table(self) -> ChainTable:
        """The head; the embedding itself where they are tied."""
        return self.embedding if self.config.tie_embeddings else self.head

    def forward(self, tokens_BT: Tensor, num_chains: int | None = None) -> Tensor:
        """Logits of whole sequences.

        Args:
            tokens_BT: int64 token ids.
            num_chains: active chains, 1..n; None for all that were built.

        Returns:
            logits_BTV at that scale, in the weights' dtype.
        """
        active = self.num_chains if num_chains is None else num_chains
        if not 1 <= active <= self.num_chains:
            raise ValueError(f"num_chains={active} must be between 1 and {self.num_chains}")
        num_sequences, num_tokens = tokens_BT.shape
        positions_T = torch.arange(num_tokens)
        cos_TD, sin_TD = rotation(inverse_frequencies(self.config), positions_T)
        x_RD = self.embedding.embed(tokens_BT.flatten(), active)
        for layer in self.blocks:
            x_RD = layer(x_RD, cos_TD, sin_TD, num_sequences, active)
        chain_rows = (x_RD.shape[0],) * active
        logits_RV = self.output_table.logits(self.final_norm(x_RD, active), chain_rows)
        return logits_RV.view(num_sequences, num_tokens, -1)


def slice_config(config: ChainConfig, num_chains: int) -> ChainConfig:
    """The model of the first `num_chains` chains, as a config of its own."""
    if num_chains == config.num_chains:
        return config
    chains = config.chains[:num_chains]
    return replace(
        config,
        dim=sum(config.chain_dims[:num_chains]),
        hidden_dim=sum(config.chain_hidden_dims[:num_chains]),
        num_heads=sum(chains),
        chains=chains,
        explicit_head_dim=config.head_dim,
    )


def parameter_shapes(config: ChainConfig, num_chains: int | None = None) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the first `num_chains` chains, without allocating any."""
    with torch.device("meta"):
        model = ChainTransformer(config, num_chains)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
