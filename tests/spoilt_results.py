"""Plain results and faulty ones, for budgets that shall let the one pass and not the other."""

from collections.abc import Callable

import pytest
import torch
from colm_kernels.tolerance import Expected
from torch import Tensor

from tests.kernel_inputs import staircase_inputs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EPS = 1e-5
Mutation = Callable[..., object]


def rejects(expected: Expected, result: Tensor) -> None:
    with pytest.raises(AssertionError, match="over their budget"):
        expected.check(result)


def mutations(**each: Mutation) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutate", each.values(), ids=each)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def swapped(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with its third and fourth elements along a dimension exchanged."""
    order = torch.arange(tensor.shape[dim])
    order[2:4] = order[2:4].flip(0)
    return tensor.index_select(dim, order)


def without(tensor: Tensor, dim: int, at: int = 5) -> Tensor:
    """The tensor with one element along a dimension set to zero."""
    return tensor.index_fill(dim, torch.tensor([at]), 0)


def without_one(weight_OI: Tensor) -> Tensor:
    """The tensor with its largest element set to zero."""
    return weight_OI.where(weight_OI.abs() < weight_OI.abs().max(), 0)


def accumulated(x_RI: Tensor, weight_OI: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A product whose terms are added one by one and rounded to a dtype each time."""
    y_RO = torch.zeros(len(x_RI), len(weight_OI), dtype=dtype)
    for i in range(x_RI.shape[1]):
        y_RO += (x_RI[:, i, None].float() * weight_OI[:, i].float()).to(dtype)
    return y_RO.to(x_RI.dtype)


ROWS = 64


def linear_case(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor], tuple[int, int]]:
    x_RI, weights, biases = staircase_inputs(ROWS, [432, 144], [1152, 384], dtype)
    return x_RI, weights, biases, (ROWS, ROWS - 7)


def angles(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    steps = 10_000 ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angle_TD = (torch.arange(num_tokens, dtype=torch.float64)[:, None] * steps).repeat(1, 2)
    return angle_TD.cos().float(), angle_TD.sin().float()
