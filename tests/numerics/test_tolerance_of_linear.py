"""The budgets of linear layers bite: a plain one in the working dtype is inside, a faulty one is not."""

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.chain_linear import chain_linear_reference
from torch import Tensor

from tests.kernel_inputs import staircase_inputs
from tests.spoilt_results import (
    DTYPES,
    ROWS,
    accumulated,
    draw,
    linear_case,
    mutations,
    rejects,
    swapped,
    without,
    without_one,
)


def linear_gradients(x_RI, weights, biases, chain_rows, grad_RO) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x_RI, *weights, *biases)]
    y_RO = chain_linear_reference(leaves[0], leaves[1:3], leaves[3:], chain_rows)
    return torch.autograd.grad(y_RO, leaves, grad_RO)


@DTYPES
def test_a_plain_linear_is_inside_with_its_gradients(dtype):
    case = linear_case(dtype)
    # With its bias in one product, where the definition rounds in between.
    x_RI, weights, biases, (_, rows) = case
    y_RO = torch.cat([torch.addmm(b, x_RI[:, : w.shape[1]], w.T) for w, b in zip(weights, biases, strict=True)], dim=1)
    y_RO[rows:, len(weights[0]) :] = 0
    tolerance.linear(*case).check(y_RO)
    grad_RO = draw(*y_RO.shape, seed=1).to(dtype)
    tolerance.check_all(tolerance.linear_gradients(*case, grad_RO), linear_gradients(*case, grad_RO))


@DTYPES
@pytest.mark.parametrize("of", [lambda tensor: tensor, torch.abs], ids=["both signs", "one sign"])
def test_the_worst_order_of_sums_is_inside(of, dtype):
    """One term after the other, as no library sums, at shapes where another processor's order broke older budgets."""
    x_RI, (weight_OI,), _ = staircase_inputs(257, [12], [1027], dtype)
    x_RI, weight_OI, grad_RO = of(x_RI), of(weight_OI), of(draw(257, 1027, seed=1).to(dtype))
    tolerance.linear(grad_RO, [weight_OI.T], None, (257,)).check(accumulated(grad_RO, weight_OI.T, torch.float32))
    of_x, of_weight = tolerance.linear_gradients(x_RI, [weight_OI], None, (257,), grad_RO)
    of_x.check(accumulated(grad_RO, weight_OI.T, torch.float32))
    of_weight.check(accumulated(grad_RO.T, x_RI.T, torch.float32))


@DTYPES
@mutations(
    dropped_input=lambda x, w, b, rows: (without(x, 1), w, b, rows),
    dropped_row=lambda x, w, b, rows: (without(x, 0), w, b, rows),
    swapped_inputs=lambda x, w, b, rows: (swapped(x, 1), w, b, rows),
    swapped_outputs=lambda x, w, b, rows: (x, [w[0], swapped(w[1], 0)], b, rows),
    dropped_output=lambda x, w, b, rows: (x, [without(w[0], 0), w[1]], b, rows),
    one_weight=lambda x, w, b, rows: (x, [without_one(w[0]), w[1]], b, rows),
    wrong_scale=lambda x, w, b, rows: (x, [w[0], w[1] * 1.01], b, rows),
    no_bias=lambda x, w, b, rows: (x, w, [b[0], b[1] * 0], rows),
    one_row_more=lambda x, w, b, rows: (x, w, b, (rows[0], rows[1] + 1)),
)
def test_a_wrong_linear_is_outside(mutate, dtype):
    case = linear_case(dtype)
    rejects(tolerance.linear(*case), chain_linear_reference(*mutate(*case)))


@DTYPES
def test_a_linear_accumulated_in_bf16_is_outside(dtype):
    x_RI, weights, _, _ = linear_case(dtype)
    rejects(tolerance.linear(x_RI, weights[1:], None, (ROWS,)), accumulated(x_RI, weights[1]))


@DTYPES
@mutations(
    dropped_output=lambda x, w, b, rows, grad: (x, w, b, rows, without(grad, 1)),
    dropped_row=lambda x, w, b, rows, grad: (without(x, 0), w, b, rows, without(grad, 0)),
    swapped_rows=lambda x, w, b, rows, grad: (swapped(x, 0), w, b, rows, grad),
    swapped_outputs=lambda x, w, b, rows, grad: (x, [swapped(w[0], 0), w[1]], b, rows, swapped(grad, 1)),
    wrong_scale=lambda x, w, b, rows, grad: (x, w, b, rows, grad * 1.02),
)
def test_wrong_gradients_are_outside(mutate, dtype):
    case = (*linear_case(dtype), draw(ROWS, 1536, seed=1).to(dtype))
    expected, results = tolerance.linear_gradients(*case), linear_gradients(*mutate(*case))
    with pytest.raises(AssertionError, match="over their budget"):
        tolerance.check_all(expected, results)


@DTYPES
def test_gradients_accumulated_in_bf16_are_outside(dtype):
    x_RI, weights, _, _ = linear_case(dtype)
    weight_OI, grad_RO = weights[1], draw(ROWS, 384, seed=1).to(dtype)
    of_x, of_weight = tolerance.linear_gradients(x_RI, [weight_OI], None, (ROWS,), grad_RO)
    rejects(of_x, accumulated(grad_RO, weight_OI.T))
    rejects(of_weight, accumulated(grad_RO.T, x_RI.T))
