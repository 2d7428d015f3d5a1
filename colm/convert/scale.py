"""One scale of a model as a checkpoint of its own."""

import os

from torch import Tensor

from colm.checkpoint import Checkpoint, save
from colm.convert.llama import Progress
from colm.model import parameter_shapes
from colm.model.transformer import slice_config


def slice_scale(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    num_chains: int,
    *,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write the first chains of a checkpoint; it answers as the whole does at that scale, bit for bit.

    Nothing of the later chains is read. A tied head stays tied.

    Args:
        src: an existing checkpoint.
        dest: directory to write; an older checkpoint there is replaced.
        num_chains: the scale, 1..n.
        progress: told after each tensor.

    Returns:
        The saved checkpoint, in the source's dtype.

    Raises:
        ValueError: `num_chains` is outside the model.
        CheckpointError: `src` is not a checkpoint.
    """
    source = Checkpoint.open(src)
    config = slice_config(source.config, source.config.resolve_num_chains(num_chains))
    names = list(parameter_shapes(config))
    tensors: dict[str, Tensor] = {}
    for done, name in enumerate(names, start=1):
        tensors |= source.tensors([name])
        if progress is not None:
            progress(done, len(names))
    return save(dest, config, tensors, text=source.text, tokenizer_json=source.tokenizer_json())
