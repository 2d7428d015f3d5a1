"""The dtypes that weights, keys and values may have, under the names that users write."""

import torch

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


def fastest_dtype() -> torch.dtype:
    """bfloat16 where the matrix units of this machine read it, else float32."""
    if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported():  # noqa: SLF001 - torch has no public probe
        return torch.bfloat16
    return torch.float32
