"""The dtypes that weights, keys and values may have, under the names that users write."""

import torch
from colm_kernels import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        ValueError: unknown name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the matrix units of a device read it, else float32.

    With AVX2 alone the kernels' library multiplies bfloat16 at prefill as fast as float32, and a decode step, which
    reads weights, keys and values, takes 1.5 to 1.8 times less (docs/log.md). PyTorch alone is several times slower.
    """
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():  # noqa: SLF001 - torch has no public probe
        return torch.bfloat16
    return torch.bfloat16 if native.default_variant(torch.bfloat16) == "avx2" else torch.float32
