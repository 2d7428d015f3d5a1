"""Which prefills this machine has room for, said before any memory is taken."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from bench.harness.units import length
from cluster.cli.output import human_bytes
from colm.checkpoint import prefill_tensor_names
from colm.kv import KvFormat
from colm.model import parameter_shapes
from colm.model.config import ChainConfig
from colm.model.transformer import slice_config
from prefill_node.memory import run_bytes

SCRATCH_BYTES = 64 << 20
"""Room for what the threads of one operation work in, whatever the prompt."""


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """One prompt's length on one model."""

    model: str
    config: ChainConfig
    num_tokens: int

    @property
    def name(self) -> str:
        """E.g. `llama_8K`."""
        return f"{self.model}_{length(self.num_tokens)}"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A prefill that does not run, and why."""

    model: str
    num_tokens: int
    reason: str


@cache
def weights_bytes(config: ChainConfig, dtype: torch.dtype) -> int:
    """Of the tensors that a prefill engine holds."""
    shapes = parameter_shapes(config, 1)
    return sum(shapes[name].numel() for name in prefill_tensor_names(config)) * dtype.itemsize


def working_bytes(config: ChainConfig, dtype: torch.dtype, *, num_tokens: int, tile_tokens: int) -> int:
    """What a process with one prefill engine takes beside the weights: the run, and what libraries take once.

    That is a copy of one operation's weight, as libraries pack it, and the threads' own.
    """
    chain1 = slice_config(config, 1)
    packed = chain1.dim * max(chain1.num_heads * chain1.head_dim, chain1.hidden_dim) * dtype.itemsize
    run = run_bytes(config, dtype, num_tokens=num_tokens, tile_tokens=tile_tokens)
    return run + packed + SCRATCH_BYTES


def sampled_bytes(configs: Sequence[ChainConfig], dtype: torch.dtype, *, num_tokens: int, tile_tokens: int) -> int:
    """What samples of one layer of each model take together: their weights, and the rest of the one that takes most.

    That is the layer's keys and values of the whole prompt, which models with the same heads share, and a tile's work.
    """
    weights = sum(weights_bytes(replace(config, num_layers=2, vocab_size=1), dtype) for config in configs)
    tile = {"num_tokens": tile_tokens, "tile_tokens": tile_tokens}
    held = (num_tokens * KvFormat.of(config, dtype).layer_token_bytes for config in configs)
    return weights + max(held) + max(working_bytes(config, dtype, **tile) for config in configs)


def choose(
    models: Mapping[str, ChainConfig],
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    tile_tokens: int,
    available_bytes: int,
) -> tuple[list[Prefill], list[Skipped]]:
    """Every model at every length, as far as they fit.

    Models take turns, so their weights are held together. One whose weights do not fit beside those of the models
    before it does not run.

    Args:
        models: configs by name.
        lengths: of prompts, in tokens.
        dtype: of weights and computation.
        tile_tokens: of the engine.
        available_bytes: what may be taken.

    Returns:
        Those that run and those that do not, models in order within each length.
    """
    held: dict[str, int] = {}
    for model, config in models.items():
        if sum(held.values()) + (needed_bytes := weights_bytes(config, dtype)) <= available_bytes:
            held[model] = needed_bytes
    runs, skipped = [], []
    for num_tokens in lengths:
        for model, config in models.items():
            needed_bytes = sum((held | {model: weights_bytes(config, dtype)}).values())
            needed_bytes += working_bytes(config, dtype, num_tokens=num_tokens, tile_tokens=tile_tokens)
            if num_tokens > config.max_context:
                reason = f"its context is {length(config.max_context)}"
            elif needed_bytes > available_bytes:
                reason = (
                    f"needs {human_bytes(needed_bytes)}, weights of {len(held.keys() | {model})} models among them; "
                    f"{human_bytes(available_bytes)} are available"
                )
            else:
                runs.append(Prefill(model=model, config=config, num_tokens=num_tokens))
                continue
            skipped.append(Skipped(model=model, num_tokens=num_tokens, reason=reason))
    return runs, skipped
