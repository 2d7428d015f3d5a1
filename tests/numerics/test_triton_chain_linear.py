"""Linear (chain) in Triton, against the definition, gradients too, within tolerance.py's budget."""

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.gpu.chain_linear import chain_linear
from torch import Tensor

from tests.gpu import TRITON_DTYPES as DTYPES
from tests.kernel_inputs import staircase_inputs as inputs

pytestmark = pytest.mark.usefixtures("where_triton_runs")

BLOCK = 64  # of fp32


def assert_matches_definition(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, chain_rows) -> Tensor:
    result = chain_linear(x, weights, biases, chain_rows)
    tolerance.linear(x, weights, biases, chain_rows).check(result)
    return result


def assert_gradients_match(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, chain_rows) -> None:
    grad = torch.randn(len(x), sum(map(len, weights)), generator=torch.Generator().manual_seed(0)).to(x.dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights, *(biases or ()))]
    end = 1 + len(weights)
    y = chain_linear(leaves[0], leaves[1:end], leaves[end:] or None, chain_rows)
    expected = tolerance.linear_gradients(x, weights, biases, chain_rows, grad)
    tolerance.check_all(expected, torch.autograd.grad(y, leaves, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_dim", [1, 31, 32, 33, 64, 97])
@pytest.mark.parametrize("out_dim", [1, 61, BLOCK, BLOCK + 1])
def test_every_width_matches(out_dim, in_dim, dtype):
    x, weights, biases = inputs(3, [in_dim], [out_dim], dtype)
    assert_matches_definition(x, weights, biases, (3,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 63, 64, 65, 131])
def test_every_number_of_rows_matches(num_rows, dtype):
    x, weights, _ = inputs(num_rows, [40, 27], [30, 13], dtype)
    assert_matches_definition(x, weights, None, (num_rows, num_rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_dims", [[64, 64, 32], [32, 48, 16]])
def test_aligned_tiles_match(in_dims, dtype):
    x, weights, biases = inputs(48, in_dims, [128, 64, 32], dtype)
    assert_matches_definition(x, weights, biases, (48, 48, 48))
    assert_gradients_match(x, weights, biases, (48, 48, 48))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain_rows", [(1, 1, 1), (5, 3, 1), (16, 5, 4), (4, 0, 0), (20, 3, 1), (70, 65, 3)])
def test_chains_serve_their_rows_and_leave_zeros_to_the_others(chain_rows, dtype):
    out_dims = [21, 8, 5]
    x, weights, biases = inputs(chain_rows[0], [33, 16, 7], out_dims, dtype)
    result = assert_matches_definition(x, weights, biases, chain_rows)
    for part, rows in zip(result.split(out_dims, dim=1), chain_rows, strict=True):
        assert not part[rows:].any()
    assert_gradients_match(x, weights, biases, chain_rows)


def test_row_tiles_of_several_groups_match():
    x, weights, _ = inputs(9 * BLOCK + 5, [9, 4], [70, 3], torch.float32)
    assert_matches_definition(x, weights, None, (len(x), 3 * BLOCK))


def test_rows_before_the_first_chain_may_be_fewer_than_x_has():
    x, weights, _ = inputs(4, [9], [11], torch.float32)
    assert not assert_matches_definition(x, weights, None, (2,))[2:].any()


def test_a_scale_that_is_a_slice_of_wider_weights_is_read_in_place():
    x, weights, biases = inputs(5, [20, 12], [30, 14], torch.float32)
    stores = [torch.full((len(weight) + 2, weight.shape[1] + 3), float("nan")) for weight in weights]
    for store, weight in zip(stores, weights, strict=True):
        store[1:-1, 2:-1] = weight
    sliced = [store[1:-1, 2:-1] for store in stores]
    wide_x = torch.full((10, 40), float("nan"))
    wide_x[::2, 3:35] = x
    assert torch.equal(
        chain_linear(wide_x[::2, 3:35], sliced, biases, (5, 5)), chain_linear(x, weights, biases, (5, 5))
    )
    turned = [weight.t().contiguous().t() for weight in weights]
    assert torch.equal(
        chain_linear(x.t().contiguous().t(), turned, biases, (5, 5)), chain_linear(x, weights, biases, (5, 5))
    )


def test_new_weights_at_an_old_address_are_read_anew():
    x, weights, _ = inputs(5, [20], [30], torch.float32)
    before = chain_linear(x, weights, None, (5,))
    weights[0].mul_(2)
    assert torch.equal(chain_linear(x, weights, None, (5,)), 2 * before)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen):
    x, weights, _ = inputs(5, [20, 12], [30, 14], torch.float32)
    leaves = [x, *weights]
    for at, leaf in enumerate(leaves):
        leaf.requires_grad_(at != frozen)
    chain_linear(x, weights, None, (5, 3)).sum().backward()
    expected = tolerance.linear_gradients(x, weights, None, (5, 3), torch.ones(5, 44))
    for at, leaf in enumerate(leaves):
        if at == frozen:
            assert leaf.grad is None
        else:
            expected[at].check(leaf.grad)


def test_nothing_in_nothing_out():
    x, weights, biases = inputs(3, [0], [5], torch.float32)
    assert torch.equal(chain_linear(x, weights, biases, (3,)), biases[0].expand(3, 5))
    assert chain_linear(torch.ones(3, 5), [torch.empty(0, 5)], None, (3,)).shape == (3, 0)
    assert chain_linear(torch.ones(0, 5), [torch.empty(2, 5)], None, (0,)).shape == (0, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row_chain_and_output(value):
    x, weights, _ = inputs(6, [37, 9], [18, 10], torch.float32)
    clean = chain_linear(x, weights, None, (6, 6))
    x[2, 40] = value  # an input of chain 2, in the block in which those of chain 1 end
    result = chain_linear(x, weights, None, (6, 6))
    assert torch.equal(result[:, :18], clean[:, :18])
    assert not result[2, 18:].isfinite().any()
    x[2, 40] = 1
    weights[0][5, 36] = value
    result = chain_linear(x, weights, None, (6, 6))
    assert not result[:, 5].isfinite().any()
    assert result[:, [output for output in range(28) if output != 5]].isfinite().all()
