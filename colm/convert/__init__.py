"""Models in and out.

A LLaMA from Hugging Face or GGUF becomes chain 1, `expand` adds chains, `slice_scale` takes them away, and
`to_huggingface` gives chain 1 back.
"""

import os
from pathlib import Path

import torch

from colm.checkpoint import Checkpoint
from colm.convert.expand import expand
from colm.convert.export import to_huggingface
from colm.convert.gguf import from_gguf
from colm.convert.huggingface import from_huggingface
from colm.convert.llama import Progress
from colm.convert.scale import slice_scale
from colm.convert.stretch import Stretch
from colm.convert.tiled import from_tiled
from colm.errors import CheckpointError, UnsupportedModel

__all__ = [
    "Progress",
    "Stretch",
    "expand",
    "from_any",
    "from_gguf",
    "from_huggingface",
    "from_tiled",
    "slice_scale",
    "to_huggingface",
]


def from_any(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    stretch: Stretch | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Import whatever `src` is: a GGUF file, or a Hugging Face directory.

    Args:
        src: the source model.
        dest: directory to write; an older checkpoint there is replaced.
        dtype: dtype of all weights; None as in `from_gguf` and `from_huggingface`.
        stretch: rope scaling for longer contexts than the source's; None keeps the source's rope.
        progress: told after each tensor.

    Returns:
        The saved checkpoint.

    Raises:
        UnsupportedModel: `src` is neither, or has a property that cannot be carried over.
        CheckpointError: `src` does not exist, or is broken.
    """
    path = Path(src)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a GGUF file or a Hugging Face directory")
    if path.is_file():
        return from_gguf(path, dest, dtype=dtype, stretch=stretch, progress=progress)
    if (path / "config.json").exists():
        return from_huggingface(path, dest, dtype=dtype, stretch=stretch, progress=progress)
    raise UnsupportedModel(f"{path} has no config.json; give a GGUF file or a Hugging Face directory")
