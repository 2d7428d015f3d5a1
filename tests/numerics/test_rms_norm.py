"""RMSNorm (chain): every variant against the definition, chain by chain.

Shapes: R rows, D features of the active chains.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.native import use_variant
from colm_kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_reference
from torch import Tensor

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)
EPS = 1e-5
DIMS = [[1], [2], [7], [8], [15], [16], [17], [63], [64], [65], [97], [576], [576, 192], [17, 5, 1, 33], [3, 64, 64]]


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def inputs(num_rows: int, dims: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x_RD, gains."""
    generator = torch.Generator().manual_seed(num_rows + sum(dims))
    x_RD = 3 * torch.randn(num_rows, sum(dims), generator=generator)
    return x_RD.to(dtype), [torch.randn(dim, generator=generator).to(dtype) for dim in dims]


def assert_matches_definition(result: Tensor, x_RD: Tensor, gains: list[Tensor]) -> None:
    tolerance.rms_norm(x_RD, gains, EPS).check(result)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_every_width_matches(num_rows, dims, dtype):
    x_RD, gains = inputs(num_rows, dims, dtype)
    before = x_RD.clone()
    assert_matches_definition(rms_norm(x_RD, gains, EPS), x_RD, gains)
    assert torch.equal(x_RD, before)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_a_residual_is_added_in_place_and_the_sum_normalised(dims, dtype):
    x_RD, gains = inputs(5, dims, dtype)
    delta_RD = inputs(6, dims, dtype)[0][1:]
    total_RD = x_RD + delta_RD
    result = add_rms_norm_(x_RD, delta_RD, gains, EPS)
    assert torch.equal(x_RD, total_RD)
    assert torch.equal(result, rms_norm(total_RD, gains, EPS))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_and_chain_get_the_same_bits_in_any_company(dtype):
    dims = [33, 16, 7]
    x_RD, gains = inputs(700, dims, dtype)  # enough for several threads
    together = rms_norm(x_RD, gains, EPS)
    for row in (0, 1, 350, 699):
        for num_chains in (1, 2, 3):
            width = sum(dims[:num_chains])
            alone = rms_norm(x_RD[row : row + 1, :width], gains[:num_chains], EPS)
            assert torch.equal(together[row, :width], alone[0])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_work_divided_over_threads_matches(dtype):
    before = torch.get_num_threads()
    x_RD, gains = inputs(1531, [576], dtype)
    delta_RD = x_RD.flip(0)
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            results.append(add_rms_norm_(x_RD.clone(), delta_RD, gains, EPS))
        finally:
            torch.set_num_threads(before)
    assert_matches_definition(results[0], x_RD + delta_RD, gains)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_read_and_written_in_place(dtype):
    whole, gains = inputs(5, [40, 7], dtype)
    store = torch.full((10, 61), float("nan"), dtype=dtype)
    x_RD = store[::2, 3:50]
    x_RD.copy_(whole)
    expected = rms_norm(whole, gains, EPS)
    assert torch.equal(rms_norm(x_RD, gains, EPS), expected)
    turned = whole.t().contiguous().t()  # features far apart: left to PyTorch
    assert_matches_definition(rms_norm(turned, gains, EPS), whole, gains)
    delta_RD = whole.flip(0)
    assert torch.equal(add_rms_norm_(x_RD, delta_RD, gains, EPS), rms_norm(whole + delta_RD, gains, EPS))
    assert torch.equal(x_RD, whole + delta_RD)
    assert store[:, 50:].isnan().all()
    assert store[1::2].isnan().all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_stay_zero(dtype):
    _, gains = inputs(1, [40, 7], dtype)
    assert not rms_norm(torch.zeros(2, 47, dtype=dtype), gains, EPS).any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row_and_chain(value, dtype):
    x_RD, gains = inputs(4, [37, 9], dtype)
    clean = rms_norm(x_RD, gains, EPS)
    x_RD[2, 40] = value  # of chain 2, in the vector in which chain 1 ends
    result = rms_norm(x_RD, gains, EPS)
    assert result[2, 40].isnan()
    others = torch.ones_like(result, dtype=torch.bool)
    others[2, 37:] = False
    assert torch.equal(result[others], clean[others])


@pytest.mark.usefixtures("variant")
def test_float64_and_gradients_run_in_pytorch():
    x_RD, gains = inputs(3, [20, 10], torch.float32)
    wide = [gain.double() for gain in gains]
    assert torch.equal(rms_norm(x_RD.double(), wide, EPS), rms_norm_reference(x_RD.double(), wide, EPS))
    for tensor in (x_RD, *gains):
        tensor.requires_grad_()
    rms_norm(x_RD, gains, EPS).sum().backward()
    assert all(tensor.grad is not None for tensor in (x_RD, *gains))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, d, g: (x[0], d, g), "x_RD has shape"),
        (lambda x, d, g: (x, d, g[:1]), "x_RD has 30 features, expected the 20 of 1 gains"),
        (lambda x, d, _g: (x, d, []), "expected the 0 of 0 gains"),
        (lambda x, d, g: (x, d, [g[0], g[1].double()]), r"gains\[1\] is torch.float64"),
        (lambda x, d, g: (x, d, [g[0], g[1][None]]), r"gains\[1\] is torch.float32 of shape \(1, 10\)"),
        (lambda x, d, g: (x, d[:1], g), r"delta_RD has shape \(1, 30\)"),
        (lambda x, d, g: (x, d.double(), g), "delta_RD has shape .* and dtype torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    x_RD, gains = inputs(3, [20, 10], torch.float32)
    with pytest.raises(ValueError, match=message):
        add_rms_norm_(*change(x_RD, x_RD.clone(), gains), EPS)
