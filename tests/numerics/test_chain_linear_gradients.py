"""Linear (chain) of many rows: values, gradients, and at most one product for each step of the staircase.

Shapes: R rows, I input features of all chains, O output features of all chains.
"""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from colm_kernels import many_rows_linear, native, tolerance
from colm_kernels.chain_linear import chain_linear, chain_linear_by_chain
from colm_kernels.many_rows_linear import WIDEN_COLUMNS, WIDEN_MIN_ROWS, widening_pays
from colm_kernels.native import use_variant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.kernels

NUM_ROWS = 5
WIDTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)
Staircase = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor] | None, Sequence[int]], Tensor]


def operands(
    widths: list[tuple[int, int]],
    bias: bool,
    dtype: torch.dtype = torch.float64,
    num_rows: int = NUM_ROWS,
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """xs, weights, biases of chains with these input and output features."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    xs = [draw(num_rows, width) for width, _ in widths]
    reach = [sum(width for width, _ in widths[: chain + 1]) for chain in range(len(widths))]
    weights = [draw(out, total) for (_, out), total in zip(widths, reach, strict=True)]
    return xs, weights, [draw(out) for _, out in widths] if bias else None


def side_by_side(x_RI, weights, biases, chain_rows) -> Tensor:
    with use_variant("torch"):  # few rows are tested in test_chain_linear.py
        return chain_linear(x_RI, weights, biases, chain_rows)


def by_chain(x_RI, weights, biases, chain_rows) -> Tensor:
    assert set(chain_rows) == {len(x_RI)}
    widths = [weights[0].shape[1], *(b.shape[1] - a.shape[1] for a, b in itertools.pairwise(weights))]
    return torch.cat(chain_linear_by_chain(x_RI.split(widths, dim=1), weights, biases), dim=1)


@pytest.fixture(params=[False, True], ids=["as-is", "widened"])
def widens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(many_rows_linear, "widening_pays", lambda: request.param)
    return request.param


def assert_matches_definition(apply: Staircase, x_RI, weights, biases, chain_rows, grad_RO=None) -> None:
    """Check y_RO and the gradients of x, weights and biases."""
    if grad_RO is None:
        shape, generator = (len(x_RI), sum(map(len, weights))), torch.Generator().manual_seed(1)
        grad_RO = torch.randn(shape, generator=generator).to(x_RI.dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (x_RI, *weights, *(biases or ()))]
    end = 1 + len(weights)
    y_RO = apply(leaves[0], leaves[1:end], leaves[end:] if biases else None, chain_rows)
    tolerance.linear(x_RI, weights, biases, chain_rows).check(y_RO)
    gradients = torch.autograd.grad(y_RO, leaves, grad_RO)
    tolerance.check_all(tolerance.linear_gradients(x_RI, weights, biases, chain_rows, grad_RO), gradients)


SHAPES = {
    "one-chain": [(31, 17)],
    "equal": [(16, 16)] * 4,
    "primes": [(13, 29), (5, 7), (1, 3)],
    "later-is-larger": [(3, 2), (64, 96)],
    "no-outputs": [(4, 5), (6, 0), (2, 3)],
    "wide-in": [(WIDEN_COLUMNS, 3), (7, 5)],
    "wide-out": [(5, WIDEN_COLUMNS + 1), (7, 2)],
}


@pytest.mark.usefixtures("widens")
@pytest.mark.parametrize("apply", [side_by_side, by_chain])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_rows", [1, 7, 101, WIDEN_MIN_ROWS - 1, WIDEN_MIN_ROWS, WIDEN_MIN_ROWS + 1])
@pytest.mark.parametrize("widths", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_masked_product(widths, num_rows, bias, dtype, apply):
    xs, weights, biases = operands(widths, bias, dtype, num_rows)
    assert_matches_definition(apply, torch.cat(xs, dim=1), weights, biases, (num_rows,) * len(widths))


@pytest.mark.usefixtures("widens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain_rows", [(300, 300, 300), (300, 257, 3), (300, 1, 0), (300, 0, 0), (299, 299, 7)])
def test_rows_that_do_not_compute_a_chain_give_and_get_nothing(chain_rows, dtype):
    xs, weights, biases = operands(SHAPES["primes"], True, dtype, 300)
    assert_matches_definition(side_by_side, torch.cat(xs, dim=1), weights, biases, chain_rows)


@pytest.mark.usefixtures("widens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, NUM_ROWS, WIDEN_MIN_ROWS + 1])
def test_a_chain_has_the_same_bits_whatever_follows(num_rows, dtype):
    xs, weights, biases = operands([(96, 61), (32, 48), (17, 9)], True, dtype, num_rows)
    whole = chain_linear_by_chain(xs, weights, biases)
    for scale in (1, 2):
        alone = chain_linear_by_chain(xs[:scale], weights[:scale], biases[:scale])
        assert all(torch.equal(a, b) for a, b in zip(alone, whole, strict=False))


@pytest.mark.usefixtures("widens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, NUM_ROWS, WIDEN_MIN_ROWS])
def test_strided_operands_match(num_rows, dtype):
    xs, weights, _ = operands([(9, 11), (6, 4)], False, dtype, num_rows)
    x_RI, *weights = (tensor.t().contiguous().t() for tensor in (torch.cat(xs, dim=1), *weights))
    grad_RO = torch.ones(1, 1, dtype=dtype).expand(num_rows, 15)
    assert_matches_definition(side_by_side, x_RI, weights, None, (num_rows, num_rows), grad_RO)


@pytest.mark.parametrize(
    ("capabilities", "variant", "expected"),
    [
        ({"amx_bf16": True}, "avx512", False),
        ({"amx_bf16": False}, "avx512_bf16", False),
        ({"amx_bf16": False}, "avx512", True),
        ({}, "avx2", True),
        ({}, "torch", False),
    ],
)
def test_products_widen_only_where_bf16_is_known_to_be_slow(capabilities, variant, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(native, "default_variant", lambda _dtype: variant)
    assert widening_pays.__wrapped__() is expected


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_freezing_chains_leaves_the_other_gradients_as_they_are(num_frozen):
    xs, weights, _ = operands([(4, 3), (2, 5), (6, 1)], bias=False)
    leaves = [tensor.requires_grad_() for tensor in (*xs[num_frozen:], *weights[num_frozen:])]

    def gradients(xs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        live = chain_linear_by_chain(xs, weights, None)[num_frozen:]
        return torch.autograd.grad([y.sum() for y in live], leaves)

    frozen = gradients(xs, weights)
    for tensor in (*xs[:num_frozen], *weights[:num_frozen]):
        tensor.requires_grad_()
    for ours, whole in zip(frozen, gradients(xs, weights), strict=True):
        tolerance.reordered(whole).check(ours)


@settings(max_examples=25, deadline=None)
@given(widths=WIDTHS, bias=st.booleans())
def test_gradients_by_chain_are_those_of_finite_differences(widths, bias):
    xs, weights, biases = operands(widths, bias)
    num_chains = len(widths)
    tensors = [tensor.requires_grad_() for tensor in [*xs, *weights, *(biases or [])]]

    def apply(*tensors):
        rest = list(tensors[2 * num_chains :]) or None
        return tuple(chain_linear_by_chain(tensors[:num_chains], tensors[num_chains : 2 * num_chains], rest))

    assert gradcheck(apply, tensors)


def products(widths: list[tuple[int, int]], num_frozen: int) -> tuple[int, int, int]:
    """(forward, backward) multiply-adds and the number of products in the backward pass, by the flop counter."""
    xs, weights, _ = operands(widths, bias=False)
    for tensor in [*xs[num_frozen:], *weights[num_frozen:]]:
        tensor.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        ys = chain_linear_by_chain(xs, weights, None)
    assert [y.requires_grad for y in ys] == [chain >= num_frozen for chain in range(len(xs))]
    with FlopCounterMode(display=False) as backward, CountProducts() as count:
        torch.autograd.backward(ys[num_frozen:], [torch.ones_like(y) for y in ys[num_frozen:]])
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2, count.products


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@settings(max_examples=25, deadline=None)
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


@pytest.mark.parametrize("trains_x", [False, True])
@pytest.mark.parametrize("trained", [(), (0,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_side_by_side_only_what_trains_is_multiplied(trained, trains_x):
    widths, chain_rows = [(4, 3), (2, 5), (3, 2)], (5, 4, 2)
    xs, weights, _ = operands(widths, bias=False)
    x_RI = torch.cat(xs, dim=1).requires_grad_(trains_x)
    for chain in trained:
        weights[chain].requires_grad_()
    y_RO = chain_linear(x_RI, weights, None, chain_rows)
    assert y_RO.requires_grad is bool(trains_x or trained)
    if not y_RO.requires_grad:
        return
    with FlopCounterMode(display=False) as counter:
        y_RO.sum().backward()
    area = [rows * weight.numel() for rows, weight in zip(chain_rows, weights, strict=True)]
    assert counter.get_total_flops() == 2 * (sum(area[chain] for chain in trained) + trains_x * sum(area))
    assert [weight.grad is not None for weight in weights] == [chain in trained for chain in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _xs, _w, _b: ([], [], None), "xs has 0 chains"),
        (lambda xs, w, b: (xs[:1], w, b), "xs has 1 chains, weights 2, biases 2"),
        (lambda xs, w, b: (xs, w, b[:1]), "xs has 2 chains, weights 2, biases 1"),
        (lambda xs, w, b: ([xs[0], xs[1][:2]], w, b), r"xs\[1\] has shape"),
        (lambda xs, w, b: (xs, [w[0], w[1][:, :-1]], b), r"weights\[1\] has shape"),
        (lambda xs, w, b: (xs, w, [b[0], b[1][:1]]), r"biases\[1\] has shape"),
        (lambda xs, w, b: (xs, [w[0], w[1].float()], b), r"weights\[1\]=torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        chain_linear_by_chain(*change(*operands([(4, 3), (2, 5)], bias=True)))


def test_dtypes_that_differ_are_refused_by_name_side_by_side():
    xs, weights, _ = operands([(4, 3), (2, 5)], bias=False)
    with pytest.raises(ValueError, match=r"weights\[1\]=torch.float32"):
        chain_linear(torch.cat(xs, dim=1), [weights[0], weights[1].float()], None, (NUM_ROWS, NUM_ROWS))
