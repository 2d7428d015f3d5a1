"""What nodes of a machine have room for."""

from typing import Final

from bench.simulate.costs import KV_DTYPE, scale_bytes
from bench.simulate.decode_model import DecodeLimits
from bench.simulate.prefill_model import PrefillLimits
from colm import defaults
from colm.errors import ConfigError
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from decode_node.kv_layout import KvLayout
from decode_node.step_budget import StepBudget
from prefill_node.memory import FREE_SHARE

KEPT_SHARE: Final = 0.1
"""Of a decode node's memory, neither weights nor keys and values: activations, libraries, what is fragmented."""

STEP_TOKENS: Final = 64
"""Tokens of a decode step, prompts included; on a GPU far more would ride on one reading of the weights."""


def decode_limits(config: ChainConfig, memory_bytes: int, *, max_batch_size: int) -> DecodeLimits:
    """A decode node that gives its memory to keys and values, and whose other options have their defaults.

    Raises:
        ConfigError: the weights alone do not fit.
    """
    kv_cache_bytes = int(memory_bytes * (1 - KEPT_SHARE)) - scale_bytes(config, config.num_chains)
    layout = KvLayout(KvFormat.of(config, KV_DTYPE), defaults.PAGE_TOKENS)
    if kv_cache_bytes < layout.page_bytes:
        raise ConfigError(f"--memory-gib: {memory_bytes} bytes do not hold the model's weights and a page")
    return DecodeLimits(
        num_pages=layout.pages_within(kv_cache_bytes),
        page_tokens=layout.page_tokens,
        max_requests=max(defaults.MAX_REQUESTS, 2 * max_batch_size),
        max_batch_size=max_batch_size,
        max_local_prefill_tokens=defaults.MAX_LOCAL_PREFILL_TOKENS,
        budget=StepBudget(step_tokens=max(STEP_TOKENS, max_batch_size), max_tokens=STEP_TOKENS),
    )


def prefill_limits(config: ChainConfig, memory_bytes: int) -> PrefillLimits:
    """A prefill node that gives its prompts the share of free memory that a real one takes.

    Raises:
        ConfigError: the weights alone do not fit.
    """
    free_bytes = memory_bytes - scale_bytes(config, 1)
    if free_bytes <= 0:
        raise ConfigError(f"--memory-gib: {memory_bytes} bytes do not hold chain 1's weights")
    return PrefillLimits(
        memory_bytes=int(FREE_SHARE * free_bytes),
        max_queued=defaults.MAX_QUEUED,
        max_queued_s=defaults.MAX_QUEUED_S,
    )
