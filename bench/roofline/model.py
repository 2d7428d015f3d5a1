"""How long a machine takes for a prefill, tile by tile, and until the first token behind a KV stream.

A layer's work is counted (`colm.flops`), and so are the bytes that its small operations move. Every layer is the same,
and a tile's attention grows with the keys before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from bench.roofline.machine import Machine, Work
from colm.flops import LayerFlops, causal_attention_flops
from colm.kv import KvFormat
from colm.model import parameter_shapes
from colm.model.config import ChainConfig
from colm.model.transformer import slice_config
from colm.wire.tile_codec import WINDOW_BYTES

ELEMENT_BYTES: Final = 2
"""bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One tile's work in any layer."""

    num_tokens: int
    keys_values: Work
    """What comes before its keys and values leave."""
    rest: Work
    """What the last layer of a prefill leaves out."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt on chain 1 of a model.

    Args:
        tile_tokens: of the engine; None for the whole prompt at once.
        is_last_layer_whole: whether the last layer attends too, as where a prefill is a model's ordinary forward.
    """

    config: ChainConfig
    num_tokens: int
    tile_tokens: int | None = None
    is_last_layer_whole: bool = False

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.config.num_layers

    @property
    def num_whole_layers(self) -> int:
        """Layers that attend."""
        return self.num_layers - (not self.is_last_layer_whole)

    def tiles(self) -> Iterator[Tile]:
        """A layer's tiles, in order."""
        chain1, flops = slice_config(self.config, 1), LayerFlops.of(self.config)
        query_dim = chain1.num_heads * chain1.head_dim
        step = self.tile_tokens or self.num_tokens
        for start in range(0, self.num_tokens, step):
            rows = min(step, self.num_tokens - start)
            # A norm reads x and writes; keys and values are read and written once more, rotated.
            moved_first = 2 * chain1.dim + 4 * chain1.kv_dim
            # Rotated queries, x plus attention's part and its norm, the gate, x plus the feed-forward's part.
            moved_rest = 2 * query_dim + 4 * chain1.dim + 3 * chain1.hidden_dim + 3 * chain1.dim
            attention = causal_attention_flops(
                num_queries=rows, num_keys=start + rows, num_heads=chain1.num_heads, head_dim=chain1.head_dim
            )
            yield Tile(
                num_tokens=rows,
                keys_values=Work(
                    linear_flops=rows * flops.keys_values,
                    weight_bytes=flops.keys_values / 2 * ELEMENT_BYTES,
                    moved_bytes=rows * moved_first * ELEMENT_BYTES,
                ),
                rest=Work(
                    linear_flops=rows * flops.rest,
                    attention_flops=attention,
                    weight_bytes=flops.rest / 2 * ELEMENT_BYTES,
                    moved_bytes=rows * moved_rest * ELEMENT_BYTES,
                ),
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One tile of one layer on a machine."""

    num_tokens: int
    before_s: float
    """Until its keys and values can leave."""
    after_s: float
    """What follows until the next tile begins; nothing in a layer that is not whole."""


def layer_steps(machine: Machine, prompt: Prompt, *, is_whole: bool) -> list[Step]:
    """A layer's steps; where the host is the slower one, the device waits before it begins."""
    steps = []
    for tile in prompt.tiles():
        before_s, after_s = machine.seconds(tile.keys_values), machine.seconds(tile.rest) if is_whole else 0.0
        waits_s = machine.step_seconds(before_s + after_s) - before_s - after_s
        steps.append(Step(num_tokens=tile.num_tokens, before_s=waits_s + before_s, after_s=after_s))
    return steps


def prefill_s(machine: Machine, prompt: Prompt) -> float:
    """Until the last tile's keys and values are there."""
    whole_s = sum(step.before_s + step.after_s for step in layer_steps(machine, prompt, is_whole=True))
    cut_s = sum(step.before_s for step in layer_steps(machine, prompt, is_whole=False))
    return prompt.num_whole_layers * whole_s + (prompt.num_layers - prompt.num_whole_layers) * cut_s


def streamed_s(machine: Machine, prompt: Prompt, stream_bytes_per_s: float, window_bytes: int = WINDOW_BYTES) -> float:
    """Until the last tile has arrived.

    Tiles leave one after the other, beside the computation; it waits while more than the window has not arrived, as a
    prefill node does.
    """
    tile_bytes = KvFormat.of(prompt.config, torch.bfloat16).layer_token_bytes
    computed_s = 0.0
    arrivals: list[tuple[float, float]] = []  # when, and bytes up to there; the window moves over them
    sent_bytes, oldest, arrived_bytes, last_s = 0.0, 0, 0.0, 0.0
    whole, cut = (layer_steps(machine, prompt, is_whole=is_whole) for is_whole in (True, False))
    for layer in range(prompt.num_layers):
        for step in whole if layer < prompt.num_whole_layers else cut:
            while sent_bytes - arrived_bytes > window_bytes:
                arrived_s, arrived_bytes = arrivals[oldest]
                oldest += 1
                computed_s = max(computed_s, arrived_s)
            sent_bytes += step.num_tokens * tile_bytes
            last_s = max(last_s, computed_s + step.before_s) + step.num_tokens * tile_bytes / stream_bytes_per_s
            arrivals.append((last_s, sent_bytes))
            computed_s += step.before_s + step.after_s
    return last_s


def first_step_s(machine: Machine, config: ChainConfig, num_tokens: int) -> float:
    """The decode node's first step, with all chains: it reads every weight, the cache, and waits for its host.

    The decode node is taken to be a machine of the same kind.
    """
    weights = _decode_weight_bytes(config)
    kept = num_tokens * KvFormat.of(config, torch.bfloat16).token_bytes
    device_s = (weights + kept) / (machine.memory_gb_per_s * 1e9)
    return config.num_layers * machine.decode_layer_seconds(device_s / config.num_layers)


@cache
def _decode_weight_bytes(config: ChainConfig) -> int:
    shapes = parameter_shapes(config).items()
    return sum(shape.numel() for name, shape in shapes if not name.startswith("embedding.")) * ELEMENT_BYTES
