"""Linear (chain) with gradients: right, and no more products than the staircase has steps."""

import pytest
import torch
from colm_kernels.chain_linear import chain_linear_reference
from colm_kernels.tolerance import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from colm.model.staircase import staircase

NUM_ROWS = 5
WIDTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


def operands(widths: list[tuple[int, int]], bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(NUM_ROWS, width, generator=generator, dtype=dtype) for width, _ in widths]
    reach = [sum(width for width, _ in widths[: chain + 1]) for chain in range(len(widths))]
    shapes = [(out, total) for (_, out), total in zip(widths, reach, strict=True)]
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    biases = [torch.randn(out, generator=generator, dtype=dtype) for _, out in widths] if bias else None
    return xs, weights, biases


@settings(max_examples=25)
@given(widths=WIDTHS, bias=st.booleans())
def test_gradients_are_those_of_the_definition(widths, bias):
    xs, weights, biases = operands(widths, bias)
    num_chains = len(widths)
    tensors = [tensor.requires_grad_() for tensor in [*xs, *weights, *(biases or [])]]

    def apply(*tensors):
        rest = list(tensors[2 * num_chains :]) or None
        return tuple(staircase(tensors[:num_chains], tensors[num_chains : 2 * num_chains], rest))

    assert gradcheck(apply, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_values_are_those_of_the_masked_product(bias, dtype):
    widths = [(64, 96), (32, 48), (32, 48)]
    xs, weights, biases = operands(widths, bias, dtype)
    wide = [[t.double() for t in ts] if ts else None for ts in (weights, biases)]
    rows = (NUM_ROWS,) * len(widths)
    ours = torch.cat(staircase(xs, weights, biases), dim=1)
    eager = chain_linear_reference(torch.cat(xs, dim=1), weights, biases, rows)
    reference = chain_linear_reference(torch.cat(xs, dim=1).double(), wide[0], wide[1], rows)
    assert_within_budget(ours, eager, reference)


def products(widths: list[tuple[int, int]], num_frozen: int) -> tuple[int, int, int]:
    """(forward, backward) multiply-adds and the number of products in the backward pass, by the flop counter."""
    xs, weights, _ = operands(widths, bias=False)
    for tensor in [*xs[num_frozen:], *weights[num_frozen:]]:
        tensor.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        ys = staircase(xs, weights, None)
    assert [y.requires_grad for y in ys] == [chain >= num_frozen for chain in range(len(xs))]
    with FlopCounterMode(display=False) as backward, CountProducts() as count:
        torch.autograd.backward(ys[num_frozen:], [torch.ones_like(y) for y in ys[num_frozen:]])
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2, count.products


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@settings(max_examples=25)
@given(widths=WIDTHS, data=st.data())
def test_no_product_beyond_the_steps_and_none_for_what_is_frozen(widths, data):
    num_frozen = data.draw(st.integers(0, len(widths) - 1))
    reach = [sum(width for width, _ in widths[: chain + 1]) for chain in range(len(widths))]
    area = [out * total for (_, out), total in zip(widths, reach, strict=True)]
    frozen_width = sum(width for width, _ in widths[:num_frozen])
    live = range(num_frozen, len(widths))
    forward, backward, num_products = products(widths, num_frozen)
    assert forward == NUM_ROWS * sum(area)
    of_weights = sum(area[chain] for chain in live)
    of_inputs = sum(widths[chain][1] * (reach[chain] - frozen_width) for chain in live)
    assert backward == NUM_ROWS * (of_weights + of_inputs)
    assert num_products == 2 * len(live)
