"""Whether numbers are numbers: one pass over them, at the speed of memory."""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

NOT_FINITE: Final = "holds NaN or infinities"
# Read as whole numbers, those that are not finite are the largest of their sign: their exponent is all ones.
_WHOLE: Final = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}
_INFINITY: Final = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinities.

    The least and the greatest number are enough, since NaN is both. `isfinite` makes tensors on the way: 400 ms against
    6 ms for weights of 54 MiB (2 cores of an AMD Zen 4).
    """
    if not tensor.numel():
        return True
    lowest, highest = tensor.aminmax()
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())


def bytes_are_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """The same of a tensor's bytes, in one thread: a tile of keys is too small to wait for other threads.

    Args:
        data: one number or more, little-endian, aligned to their size.
        dtype: float32, bfloat16 or float16.
    """
    signed, unsigned = _WHOLE[dtype.itemsize]
    sign, infinity = 1 << (8 * dtype.itemsize - 1), _INFINITY[dtype]
    bits = np.frombuffer(data, signed)
    return bool(bits.max() < infinity and bits.view(unsigned).max() < sign + infinity)
