"""ChainTransformer: LLaMA (one chain), CoLM (several), and CoLM-Air (several over one set of keys and values).

Shapes: B sequences, T tokens, R = B*T rows, D model features of one chain, V vocabulary; N tokens of one sequence, H
query heads and K kv heads of chain 1, E head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from colm.model.block import ChainBlock
from colm.model.config import ChainConfig
from colm.model.embedding import ChainTable, nested_logits
from colm.model.norm import ChainRMSNorm
from colm.model.rope import Rope
from colm.model.weights import ChainWeights


class ChainTransformer(nn.Module):
    """The whole model in plain PyTorch. Parameter names are the checkpoint's tensor names.

    Args:
        config: shape of the whole model.
        num_chains: chains to build; None for all. The rest of the model does not exist in memory.

    The nodes run its modules on all active chains side by side in one tensor (`forward`). The model itself runs them
    on one tensor a chain (`by_chain`): that follows the definitions, and gradients end at frozen chains.
    """

    def __init__(self, config: ChainConfig, num_chains: int | None = None) -> None:
        super().__init__()
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

    @property
    def multiplied(self) -> dict[str, ChainWeights]:
        """By name, what a step multiplies by: every linear and the head, but no embedding that is not tied to it."""
        of_all = {name: module for name, module in self.named_modules() if isinstance(module, ChainWeights)}
        return {name: m for name, m in of_all.items() if m is not self.embedding or m is self.output_table}

    def forward(self, tokens_BT: Tensor, num_chains: int | None = None) -> Tensor:
        """Logits of whole sequences.

        Args:
            tokens_BT: int64 token ids.
            num_chains: active chains, 1..n; None for all that were built.

        Returns:
            logits_BTV at that scale, in the weights' dtype.
        """
        xs = self.hidden_states(tokens_BT, num_chains)
        logits_RV = nested_logits(xs, self.output_table.matrices(len(xs)))
        return logits_RV.view(*tokens_BT.shape, -1)

    def hidden_states(self, tokens_BT: Tensor, num_chains: int | None = None) -> list[Tensor]:
        """What the head reads: x_RD after the final norm, one tensor for each active chain.

        Tensors of frozen chains carry no graph: see `colm.training.stages`.
        """
        active = self.num_chains if num_chains is None else num_chains
        if not 1 <= active <= self.num_chains:
            raise ValueError(f"num_chains={active} must be between 1 and {self.num_chains}")
        num_sequences, num_tokens = tokens_BT.shape
        device = tokens_BT.device
        cos_TD, sin_TD = Rope(self.config, device).tables(torch.arange(num_tokens, device=device))
        xs = self.embedding.embed_by_chain(tokens_BT.flatten(), active)
        for layer in self.blocks:
            xs = layer.by_chain(xs, cos_TD, sin_TD, num_sequences)
        return self.final_norm.by_chain(xs)

    def chain1_heads(self, tokens_N: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(q_NHE, k_KNE, v_KNE) of chain 1 in every layer, rotated: what a prefill is compared with.

        Args:
            tokens_N: int64 token ids of one sequence.
        """
        cos_NE, sin_NE = Rope(self.config, tokens_N.device).tables(torch.arange(len(tokens_N), device=tokens_N.device))
        xs = self.embedding.embed_by_chain(tokens_N, 1)
        for layer in self.blocks:
            queries, keys, values = layer.attention.heads_by_chain(layer.attention_norm.by_chain(xs), cos_NE, sin_NE)
            yield queries[0], keys[0].transpose(0, 1), values[0].transpose(0, 1)
            xs = layer.by_chain(xs, cos_NE, sin_NE, 1)


@cache
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
        num_kv_heads=sum(config.chain_kv_heads[:num_chains]),
        chains=chains,
    )


def parameter_shapes(config: ChainConfig, num_chains: int | None = None) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the first `num_chains` chains, without allocating any."""
    with torch.device("meta"):
        model = ChainTransformer(config, num_chains)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def num_parameters(config: ChainConfig, num_chains: int | None = None) -> int:
    """Weights of the model of the first `num_chains` chains; a tied head is counted once."""
    return sum(shape.numel() for shape in parameter_shapes(config, num_chains).values())


def num_step_parameters(config: ChainConfig, num_chains: int | None = None) -> int:
    """Weights of the first `num_chains` chains that a decode step reads: all but an embedding that is not the head."""
    looked_up = 0 if config.tie_embeddings else config.vocab_size * sum(config.chain_dims[:num_chains])
    return num_parameters(config, num_chains) - looked_up
