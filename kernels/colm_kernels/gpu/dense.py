"""Chooses the implementation of dense prefill attention that a GPU runs; no other file does.

Shapes: as in colm_kernels/prefill_attention.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from colm_kernels.gpu import flash_attn_adapter
from colm_kernels.gpu.prefill_attention import prefill_attention as in_triton
from colm_kernels.prefill_attention import Backend


def prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Attend with the backend named; "auto" is flash-attn if it is installed and takes the queries, else Triton.

    Raises:
        ValueError: the backend does not take the dtype or head dim, or is not installed.
    """
    return choose(backend, q_THD.dtype, q_THD.shape[2])(q_THD, k_KSD, v_KSD)


def choose(
    backend: Backend, dtype: torch.dtype, head_dim: int
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the function that attends for queries of a dtype and head dim.

    Raises:
        ValueError: the backend named is not installed or does not take them; the message says why.
    """
    if backend == "triton":
        return in_triton
    reason = flash_attn_adapter.why_not(dtype, head_dim)
    if reason is None:
        return flash_attn_adapter.prefill_attention
    if backend == "flash_attn":
        raise ValueError(f"backend={backend!r}: {reason}; use 'auto' or 'triton'")
    return in_triton
