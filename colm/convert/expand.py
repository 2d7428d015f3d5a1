"""Chain expansion: an existing checkpoint becomes the first chains of a larger model."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, save
from colm.convert.llama import Progress
from colm.errors import UnsupportedModel
from colm.model import parameter_shapes
from colm.model.config import ChainConfig

INIT_STD = 0.02
"""Standard deviation of fresh weights, the usual one for LLaMA."""


def expand(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    chains: Sequence[int],
    *,
    kv_sharing: bool | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Checkpoint:
    """Add fresh chains to a checkpoint; its logits at every scale it had stay what they were, bit for bit.

    Existing blocks are copied. Fresh ones: normal with standard deviation 0.02; the blocks that write to the
    residual stream (`wo`, `down`) divided by sqrt(2 * num_layers), so that depth does not inflate it; gains
    1; biases 0; head columns 0, so that a fresh chain changes no logit until it is trained. The other weights are not
    zero: in the first step only the head columns have a gradient, and they need features to learn from; random weights
    also give each unit of the chain a gradient of its own. The width per head is kept, in the residual stream and in
    the feed-forward; without KV sharing the kv heads grow in the same ratio.

    A tied head is untied: the fresh head columns must be zero while the fresh embedding columns must not, and
    one table cannot be both. The head's existing chains start as copies of the embedding's.

    Args:
        src: an existing checkpoint.
        dest: directory to write; an older checkpoint there is replaced.
        chains: query heads of every chain, beginning with the source's, e.g. (9, 3) for a source of (9,).
        kv_sharing: whether the fresh chains read chain 1's keys and values (True) or have their own (False). None
            keeps the source's setting, which is fixed for a source of several chains; for one chain None is True.
        seed: of the fresh weights.
        progress: told after each tensor.

    Returns:
        The saved checkpoint, in the source's dtype.

    Raises:
        UnsupportedModel: `chains` or `kv_sharing` do not extend the source's, or the dimensions do not split in
            that ratio.
        CheckpointError: `src` is not a checkpoint.
    """
    source = Checkpoint.open(src)
    config = _expanded_config(source.config, tuple(chains), kv_sharing)
    existing = set(parameter_shapes(source.config))
    shapes = parameter_shapes(config)
    dtype = source.dtype()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        if name in existing:
            tensors[name] = source.tensors([name])[name]
        elif (twin := name.replace("head.", "embedding.")) in existing:
            # safetensors refuses two names for the same memory.
            tensors[name] = source.tensors([twin])[twin].clone()
        else:
            tensors[name] = _fresh(name, shape, config.num_layers, generator).to(dtype)
        if progress is not None:
            progress(done, len(shapes))
    return save(dest, config, tensors, text=source.text, tokenizer_json=source.tokenizer_json())


def _expanded_config(config: ChainConfig, chains: tuple[int, ...], kv_sharing: bool | None) -> ChainConfig:
    kept = config.chains
    if chains[: len(kept)] != kept or len(chains) == len(kept):
        raise UnsupportedModel(
            f"chains={chains} must begin with the source's {kept} and add at least one, e.g. {(*kept, kept[0])}"
        )
    if len(kept) == 1:
        shares = kv_sharing is not False
    elif kv_sharing in (None, config.kv_sharing):
        shares = config.kv_sharing
    else:
        raise UnsupportedModel(
            f"kv_sharing={kv_sharing}, but the source's {len(kept)} chains have kv_sharing={config.kv_sharing}; "
            "only one chain can be expanded either way"
        )
    growing = ("dim", "hidden_dim") if shares else ("dim", "hidden_dim", "num_kv_heads")
    widths = {}
    for name in growing:
        width, rest = divmod(getattr(config, name) * sum(chains), sum(kept))
        if rest:
            step = sum(kept) // math.gcd(getattr(config, name), sum(kept))
            raise UnsupportedModel(
                f"chains={chains}: {name}={getattr(config, name)} over {sum(kept)} heads does not grow to "
                f"{sum(chains)} heads in whole numbers; use chains whose sum is a multiple of {step}"
            )
        widths[name] = width
    try:
        return replace(config, **widths, chains=chains, num_heads=sum(chains), tie_embeddings=False, kv_sharing=shares)
    except ValueError as err:
        raise UnsupportedModel(str(err)) from err


def _fresh(name: str, shape: torch.Size, num_layers: int, generator: torch.Generator) -> Tensor:
    if "norm." in name:
        return torch.ones(shape)
    if name.startswith("head.") or name.endswith("_bias"):
        return torch.zeros(shape)
    writes_residual = ".wo." in name or ".down." in name
    std = INIT_STD / math.sqrt(2 * num_layers) if writes_residual else INIT_STD
    return torch.empty(shape).normal_(0.0, std, generator=generator)
