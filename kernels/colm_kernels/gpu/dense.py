"""Which implementation of dense prefill attention a GPU runs: the one place that chooses.

Shapes: as in colm_kernels/prefill_attention.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from colm_kernels.gpu import flash_attn_adapter
from colm_kernels.gpu.prefill_attention import prefill_attention as in_triton
from colm_kernels.prefill_attention import Backend


def prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """By the backend named; for "auto" by flash-attn where it is there and takes the queries, in Triton else.

    Raises:
        ValueError: the backend does not take dtype or head dim, or is not there.
    """
    return choose(backend, q_THD.dtype, q_THD.shape[2])(q_THD, k_KSD, v_KSD)


def choose(
    backend: Backend, dtype: torch.dtype, head_dim: int
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What attends for such queries.

    Raises:
        ValueError: the backend named is not there or does not take them, and why.
    """
    if backend == "triton":
        return in_triton
    reason = flash_attn_adapter.why_not(dtype, head_dim)
    if reason is None:
        return flash_attn_adapter.prefill_attention
    if backend == "flash_attn":
        raise ValueError(f"backend={backend!r}: {reason}; use 'auto' or 'triton'")
    return in_triton
