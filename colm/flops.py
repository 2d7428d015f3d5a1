"""Floating-point operations of a prefill: matrix products alone, a multiplication and an addition each."""

from dataclasses import dataclass
from functools import cache

from colm.checkpoint import prefill_tensor_names
from colm.model import parameter_shapes
from colm.model.config import ChainConfig


def causal_attention_flops(*, num_queries: int, num_keys: int, num_heads: int, head_dim: int) -> int:
    """Scores, and values weighted by them, of the last `num_queries` of `num_keys` tokens.

    Example: 2 queries and 5 keys are 4 + 5 pairs, of 4 * head_dim operations in each head.
    """
    pairs = num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2
    return 4 * num_heads * head_dim * pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFlops:
    """Of one token in the linears of one layer of chain 1."""

    keys_values: int
    """The projections that make them."""
    rest: int
    """The projections around attention, and the feed-forward; the last layer has none of it in a prefill."""

    @classmethod
    @cache
    def of(cls, config: ChainConfig) -> "LayerFlops":
        """Every layer of a model is the same."""
        shapes = parameter_shapes(config, 1)
        linears = {
            name: 2 * shapes[name].numel()
            for name in prefill_tensor_names(config)
            if len(shapes[name]) == 2 and name.startswith("layers.")  # embeddings are looked up, not multiplied
        }
        last = f"layers.{config.num_layers - 1}."
        keys_values = sum(flops for name, flops in linears.items() if name.startswith(last))
        all_rest = sum(linears.values()) - config.num_layers * keys_values
        return cls(keys_values=keys_values, rest=all_rest // max(1, config.num_layers - 1))


def prefill_flops(config: ChainConfig, num_tokens: int) -> int:
    """What a prefill of chain 1 needs: its linears and its causal attention, of the last layer only keys and values."""
    layer = LayerFlops.of(config)
    attention = causal_attention_flops(
        num_queries=num_tokens, num_keys=num_tokens, num_heads=config.chains[0], head_dim=config.head_dim
    )
    num_whole = config.num_layers - 1
    return num_tokens * (config.num_layers * layer.keys_values + num_whole * layer.rest) + num_whole * attention
