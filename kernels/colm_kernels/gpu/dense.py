"""Which implementation of dense prefill attention a GPU runs: the one place that chooses.

Shapes: as in colm_kernels/prefill_attention.py.
"""

from torch import Tensor

from colm_kernels.gpu import flash_attn_adapter
from colm_kernels.gpu.prefill_attention import prefill_attention as in_triton


def prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """By flash-attn where it is there and takes the queries, in Triton else.

    Raises:
        ValueError: neither takes the head dim.
    """
    run = flash_attn_adapter.prefill_attention if flash_attn_adapter.takes(q_THD) else in_triton
    return run(q_THD, k_KSD, v_KSD)
