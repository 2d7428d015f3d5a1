"""Chain expansion: an existing checkpoint becomes the first chains of a larger model."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, save
from colm.config import ChainConfig
from colm.convert.llama import Progress
from colm.errors import UnsupportedModel
from colm.model import parameter_shapes

INIT_STD = 0.02
"""Standard deviation of fresh weights, the usual one for LLaMA."""


def expand(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    chains: Sequence[int],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Checkpoint:
    """Add fresh chains to a checkpoint; its logits at every scale it had stay what they were, bit for bit.

    Existing blocks are copied. Fresh ones: normal with standard deviation 0.02; the blocks that write to the
    residual stream (`wo`, `down`) divided by sqrt(2 * num_layers), so that depth does not inflate it; gains
    1; head columns 0, so that a fresh chain says nothing until it is trained. Width per head is kept, of the
    residual stream and of the feed-forward alike.

    A tied head is untied: the fresh head columns must be zero while the fresh embedding columns must not, and
    one table cannot be both. The head's existing chains start as copies of the embedding's.

    Args:
        src: an existing checkpoint.
        dest: directory to write; an older checkpoint there is replaced.
        chains: query heads of every chain, beginning with the source's, e.g. (9, 3) for a source of (9,).
        seed: of the fresh weights.
        progress: told after each tensor.

    Returns:
        The saved checkpoint, in the source's dtype.

    Raises:
        UnsupportedModel: `chains` does not extend the source's, or the dimensions do not split in that ratio.
        CheckpointError: `src` is not a checkpoint.
    """
    source = Checkpoint.open(src)
    config = _expanded_config(source.config, tuple(chains))
    existing = set(parameter_shapes(source.config))
    shapes = parameter_shapes(config)
    dtype = source.dtype()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        if name in existing:
            tensors[name] = source.tensors([name])[name]
        elif (twin := name.replace("head.", "embedding.")) in existing:
            # safetensors refuses two names for one memory.
            tensors[name] = source.tensors([twin])[twin].clone()
        else:
            tensors[name] = _fresh(name, shape, config.num_layers, generator).to(dtype)
        if progress is not None:
            progress(done, len(shapes))
    path = source.tokenizer_path
    tokenizer_json = None if path is None else path.read_text(encoding="utf-8")
    return save(dest, config, tensors, text=source.text, tokenizer_json=tokenizer_json)


def _expanded_config(config: ChainConfig, chains: tuple[int, ...]) -> ChainConfig:
    kept = config.chains
    if chains[: len(kept)] != kept or len(chains) == len(kept):
        raise UnsupportedModel(
            f"chains={chains} must begin with the source's {kept} and add at least one, e.g. {(*kept, kept[0])}"
        )
    widths = {}
    for name in ("dim", "hidden_dim"):
        width, rest = divmod(getattr(config, name) * sum(chains), sum(kept))
        if rest:
            raise UnsupportedModel(
                f"chains={chains}: {name}={getattr(config, name)} over {sum(kept)} heads does not grow to "
                f"{sum(chains)} heads in whole features; use chains whose sum is a multiple of {sum(kept)}"
            )
        widths[name] = width
    try:
        return replace(
            config,
            **widths,
            chains=chains,
            num_heads=sum(chains),
            explicit_head_dim=config.head_dim,
            tie_embeddings=False,
            kv_sharing=True,
        )
    except ValueError as err:
        raise UnsupportedModel(str(err)) from err


def _fresh(name: str, shape: torch.Size, num_layers: int, generator: torch.Generator) -> Tensor:
    if "norm." in name:
        return torch.ones(shape)
    if name.startswith("head."):
        return torch.zeros(shape)
    writes_residual = ".wo." in name or ".down." in name
    std = INIT_STD / math.sqrt(2 * num_layers) if writes_residual else INIT_STD
    return torch.empty(shape).normal_(0.0, std, generator=generator)
