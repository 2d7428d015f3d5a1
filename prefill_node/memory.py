"""What a prefill takes beside the engine's weights, said before any memory is taken."""

import psutil
import torch

from colm import defaults
from colm.errors import ConfigError
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.rope import KEPT_POSITIONS
from colm.model.transformer import slice_config

KEPT_SHARE = 0.125
"""Of what is free when a node starts, for what it keeps of earlier prompts, at most."""
FREE_SHARE = 0.5
"""Of what is free when a node starts, for the prompts that it computes; the rest is for everybody else."""


def run_bytes(
    config: ChainConfig,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    tile_tokens: int,
    num_cached_tokens: int = 0,
    reads_last_token: bool = False,
) -> int:
    """Peak of one `PrefillEngine.run`; an upper bound, and a close one for long prompts.

    Of the whole prompt: token ids, hidden states, one layer's keys and values. Of its first positions: the rotary
    tables, which the engine keeps, and once more while they grow. Of a tile: everything that a layer makes of it, as if
    none were let go before the end, and the widest once more in fp32.

    Of tokens that were kept from an earlier prompt, only one layer's keys and values, for the others to attend to.

    Of the token behind the prompt, where it is read: a row, one layer's keys and values, and its logits, twice, since
    the library makes them in fp32.
    """
    if num_cached_tokens == num_tokens and not reads_last_token:
        return 8 * num_tokens
    chain1 = slice_config(config, 1)
    query_dim = chain1.num_heads * chain1.head_dim
    whole, num_new = 8 + KvFormat.of(config, dtype).layer_token_bytes, num_tokens - num_cached_tokens
    features = 4 * chain1.dim + 2 * query_dim + 2 * chain1.kv_dim + 2 * chain1.hidden_dim
    in_fp32 = 4 * chain1.head_dim + chain1.num_heads + max(query_dim, chain1.dim, chain1.hidden_dim)
    of_tile = features * dtype.itemsize + 4 * in_fp32
    tables = 4 * 4 * chain1.head_dim
    of_prompt = num_tokens * whole + num_new * chain1.dim * dtype.itemsize
    if reads_last_token:
        of_prompt += whole + of_tile + config.vocab_size * (dtype.itemsize + 4)
    return of_prompt + min(num_tokens, KEPT_POSITIONS) * tables + min(num_new, tile_tokens) * of_tile


def pack_bytes(config: ChainConfig, dtype: torch.dtype, *, num_tokens: int, tile_tokens: int) -> int:
    """What a prompt that has shared steps holds of the others' rows until its next step, even if they have ended.

    At most the rest of a tile: hidden states, those after the norm, and the rotary tables' rows. 0 for a prompt that is
    too long to share.
    """
    chain1 = slice_config(config, 1)
    return max(0, tile_tokens - num_tokens) * (2 * chain1.dim * dtype.itemsize + 2 * 4 * chain1.head_dim)


def require_room_for_a_tile(config: ChainConfig, dtype: torch.dtype, *, tile_tokens: int, memory_bytes: int) -> None:
    """Refuse tiles whose work alone has no room: no prompt of a tile's length could ever begin.

    Raises:
        ConfigError: begins with the option's name.
    """
    longest = min(tile_tokens, config.max_context)
    if (needed_bytes := run_bytes(config, dtype, num_tokens=longest, tile_tokens=longest)) > memory_bytes:
        raise ConfigError(
            f"tile_tokens={tile_tokens} takes {needed_bytes} bytes for a tile's work, and prompts have "
            f"memory_bytes={memory_bytes} in all; lower the one or raise the other"
        )


def default_prefix_cache_bytes(device: torch.device) -> int:
    """What a node keeps of earlier prompts: as much as is of use, and no more than `KEPT_SHARE` of what is free now."""
    return min(defaults.PREFIX_CACHE_BYTES, int(KEPT_SHARE * _free_bytes(device)))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def default_memory_bytes(device: torch.device, prefix_cache_bytes: int = 0) -> int:
    """`FREE_SHARE` of what the device has free now, without what the cache of prefixes will take.

    Raises:
        ConfigError: the cache would take all of it.
    """
    free_bytes = _free_bytes(device)
    if prefix_cache_bytes > free_bytes:
        raise ConfigError(
            f"prefix_cache_bytes={prefix_cache_bytes}, and the device has {free_bytes} bytes free in all; lower it"
        )
    return int(FREE_SHARE * (free_bytes - prefix_cache_bytes))
