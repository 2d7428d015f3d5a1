"""Floating-point operations of what benchmarks time: matrix products alone, a multiplication and an addition each."""

from colm.checkpoint import prefill_tensor_names
from colm.model import parameter_shapes
from colm.model.config import ChainConfig


def causal_attention_flops(*, num_queries: int, num_keys: int, num_heads: int, head_dim: int) -> int:
    """Scores, and values weighted by them, of the last `num_queries` of `num_keys` tokens.

    Example: 2 queries and 5 keys are 4 + 5 pairs, of 4 * head_dim operations in each head.
    """
    pairs = num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2
    return 4 * num_heads * head_dim * pairs


def prefill_flops(config: ChainConfig, num_tokens: int) -> int:
    """What a prefill of chain 1 needs: its linears and its causal attention, of the last layer only keys and values."""
    shapes = parameter_shapes(config, 1)
    linears = [
        shapes[name].numel()
        for name in prefill_tensor_names(config)
        if len(shapes[name]) == 2 and not name.startswith("embedding.")  # looked up, not multiplied
    ]
    attention = causal_attention_flops(
        num_queries=num_tokens, num_keys=num_tokens, num_heads=config.chains[0], head_dim=config.head_dim
    )
    return 2 * num_tokens * sum(linears) + (config.num_layers - 1) * attention
