"""Tensors side by side in huge pages: whoever streams through weights then looks up 512 times fewer addresses."""

import mmap
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

_ALIGNMENT: Final = 64
"""Bytes; a cache line, and the widest vector."""


def side_by_side(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of tensors, which may be anywhere, in memory of `empty_side_by_side`."""
    places = empty_side_by_side({name: tensor.shape for name, tensor in tensors.items()}, dtype)
    return {name: places[name].copy_(tensor) for name, tensor in tensors.items()}


def empty_side_by_side(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in one piece of CPU memory, in their order.

    Args:
        shapes: of the tensors, by name.
        dtype: of all.

    Returns:
        The tensors, contiguous; the memory is freed with the last of them. Huge pages are asked for, not demanded:
        where the system gives none, the memory is as any other.
    """
    sizes = [shape.numel() * dtype.itemsize for shape in shapes.values()]
    *places, num_bytes = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
        with suppress(OSError):  # a kernel without them
            memory.madvise(advice)
    tensors = {}
    for (name, shape), place, size in zip(shapes.items(), places, sizes, strict=True):
        if size:
            tensors[name] = torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=place).view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors
