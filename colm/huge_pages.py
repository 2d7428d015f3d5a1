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
    """Copy tensors into one piece of CPU memory, in their order.

    Args:
        tensors: anywhere.
        dtype: of the copies.

    Returns:
        The copies, contiguous; the memory is freed with the last of them. Huge pages are asked for, not demanded: where
        the system gives none, the memory is as any other.
    """
    sizes = [tensor.numel() * dtype.itemsize for tensor in tensors.values()]
    *places, num_bytes = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
        with suppress(OSError):  # a kernel without them
            memory.madvise(advice)
    copies = {}
    for (name, tensor), place, size in zip(tensors.items(), places, sizes, strict=True):
        if size:
            flat = torch.frombuffer(memory, dtype=dtype, count=tensor.numel(), offset=place)
            copies[name] = flat.view(tensor.shape).copy_(tensor)
        else:
            copies[name] = torch.empty(tensor.shape, dtype=dtype)
    return copies
