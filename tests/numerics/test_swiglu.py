"""silu(gate) * up: every variant against the definition.

Shapes: R rows, F features.
"""

from collections.abc import Iterator

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.native import use_variant
from colm_kernels.swiglu import swiglu_, swiglu_reference
from torch import Tensor

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def inputs(num_rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gate_RF, up_RF."""
    generator = torch.Generator().manual_seed(num_rows + dim)
    gate_RF, up_RF = 4 * torch.randn(2, num_rows, dim, generator=generator).to(dtype)
    return gate_RF, up_RF


def assert_matches_definition(gate_RF: Tensor, up_RF: Tensor) -> None:
    expected = tolerance.swiglu(gate_RF, up_RF)
    result = swiglu_(gate_RF, up_RF)
    assert result is gate_RF
    expected.check(result)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 97, 1536])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_every_width_matches(num_rows, dim, dtype):
    assert_matches_definition(*inputs(num_rows, dim, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_match(dtype):
    gate_RF = torch.linspace(-200, 200, 4001).to(dtype)[None]
    assert_matches_definition(gate_RF, torch.ones_like(gate_RF))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_work_divided_over_threads_matches(num_threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_matches_definition(*inputs(1009, 577, dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_read_and_written_in_place(dtype):
    gate_RF, up_RF = inputs(5, 47, dtype)
    store = torch.full((10, 61), float("nan"), dtype=dtype)
    inside = store[::2, 3:50]
    inside.copy_(gate_RF)
    assert_matches_definition(inside, up_RF)
    assert store[:, 50:].isnan().all()
    assert store[:, :3].isnan().all()
    assert store[1::2].isnan().all()
    assert_matches_definition(gate_RF.t().contiguous().t(), up_RF)  # features far apart: left to PyTorch


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zero(dtype):
    gate_RF, up_RF = inputs(2, 47, dtype)
    assert not swiglu_(torch.zeros_like(gate_RF), up_RF).any()
    assert not swiglu_(gate_RF, torch.zeros_like(up_RF)).any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_what_the_definition_says(dtype):
    gate_RF, up_RF = inputs(2, 19, dtype)
    clean = swiglu_(gate_RF.clone(), up_RF)
    gate_RF[1, 2:5] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    up_RF[1, 18] = float("nan")
    result = swiglu_(gate_RF, up_RF)
    assert result[1, [2, 4, 18]].isnan().all()
    assert result[1, 3] == up_RF[1, 3] * float("inf")
    others = [*range(2), *range(5, 18)]
    assert torch.equal(result[1, others], clean[1, others])
    assert torch.equal(result[0], clean[0])


@pytest.mark.usefixtures("variant")
def test_float64_runs_in_pytorch():
    gate_RF, up_RF = (tensor.double() for tensor in inputs(3, 20, torch.float32))
    expected = swiglu_reference(gate_RF, up_RF)
    assert torch.equal(swiglu_(gate_RF, up_RF), expected)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, u: (g[0], u), "gate_RF has shape"),
        (lambda g, u: (g, u[:2]), r"up_RF has shape \(2, 20\)"),
        (lambda g, u: (g, u.double()), "up_RF has shape .* and dtype torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        swiglu_(*change(*inputs(3, 20, torch.float32)))
