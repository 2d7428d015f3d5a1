"""The payload of a tile, written in one pass.

Shapes: K kv heads, T tokens of a tile, D head dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from colm_kernels.kv_payload import pack_payload
from torch import Tensor

from colm.finite import is_finite


def write_payload(tensors: Sequence[Tensor], out: Tensor) -> tuple[int, bool]:
    """Write a tile's tensors, one behind the other.

    Args:
        tensors: on the CPU: k_KTD, v_KTD.
        out: uint8, as many as they have.

    Returns:
        (XXH3-64 of what was written, whether no value is NaN or an infinity).
    """
    if len(tensors) == 2:
        k_KTD, v_KTD = tensors
        if (packed := pack_payload(k_KTD, v_KTD, out)) is not None:
            return packed
    start, whole = 0, out.numpy()
    for tensor in tensors:
        # NumPy has no bfloat16; it copies to any address, in this thread alone.
        values = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()
        end = start + values.nbytes
        np.copyto(whole[start:end].view(values.dtype).reshape(values.shape), values)
        start = end
    return xxhash.xxh3_64_intdigest(whole.data), all(is_finite(tensor) for tensor in tensors)
