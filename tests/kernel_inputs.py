"""Inputs of the kernels' tests, the same for every implementation of an operation."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def prefill_inputs(num_queries, num_keys, num_heads, num_kv_heads, head_dim, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q_THD, k_KSD, v_KSD."""
    generator = torch.Generator().manual_seed(num_queries * 7919 + num_keys)
    q = torch.randn(num_queries, num_heads, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(num_kv_heads, num_keys, head_dim, generator=generator).to(dtype) for _ in "kv")
    return q, k, v


def staircase_inputs(num_rows: int, in_dims: Sequence[int], out_dims: Sequence[int], dtype: torch.dtype) -> tuple:
    """x_RI, weights, biases."""
    generator = torch.Generator().manual_seed(num_rows + sum(in_dims) + sum(out_dims))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = [draw(out_dim, width) for out_dim, width in zip(out_dims, accumulate(in_dims), strict=True)]
    return draw(num_rows, sum(in_dims)), weights, [draw(out_dim) for out_dim in out_dims]
