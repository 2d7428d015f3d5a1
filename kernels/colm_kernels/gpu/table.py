"""Tables of addresses and sizes on the device, for kernels that work on several tensors in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def to_device(device: torch.device, words: Sequence[Sequence[int]], num_words: int) -> Tensor:
    """Copy a table to a device: one tensor, with rows of `num_words` int64."""
    return torch.tensor(words, dtype=torch.int64).view(-1, num_words).to(device)


@triton.jit
def word(words, at, ALIGNED: tl.constexpr):
    """Load a size or an offset; ALIGNED promises a multiple of 16."""
    value = tl.load(words + at)
    return tl.multiple_of(value, 16) if ALIGNED else value


@triton.jit
def pointer(words, at, like, ALIGNED: tl.constexpr):
    """Load an address as a pointer of `like`'s type; ALIGNED promises a multiple of 16 bytes."""
    value = tl.load(words + at).to(like.dtype)
    return tl.multiple_of(value, 16) if ALIGNED else value
