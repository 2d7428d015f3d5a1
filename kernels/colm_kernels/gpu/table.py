"""Tables of addresses and sizes that a kernel reads of its own accord, where what it works on are several tensors."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def to_device(device: torch.device, words: Sequence[Sequence[int]], num_words: int) -> Tensor:
    """The rows of a table, `num_words` int64 each, in one tensor."""
    return torch.tensor(words, dtype=torch.int64).view(-1, num_words).to(device)


@triton.jit
def word(words, at, ALIGNED: tl.constexpr):
    """A size or an offset; a multiple of 16 where ALIGNED says so."""
    value = tl.load(words + at)
    return tl.multiple_of(value, 16) if ALIGNED else value


@triton.jit
def pointer(words, at, like, ALIGNED: tl.constexpr):
    """An address, as a pointer to what `like` points to; a multiple of 16 bytes where ALIGNED says so."""
    value = tl.load(words + at).to(like.dtype)
    return tl.multiple_of(value, 16) if ALIGNED else value
