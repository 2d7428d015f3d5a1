"""Weights in panels: the layout, and every variant's products against the definition.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.chain_linear import chain_linear, joint_linear, swiglu_linear
from colm_kernels.native import use_variant
from colm_kernels.panels import PANEL_OUTPUTS, Panels, in_panels, library_variant, panels_shape, pays
from torch import Tensor

from tests.kernel_inputs import staircase_inputs as inputs

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)
DEPTH, GROUP, TILE = 128, 64, 8  # panel.h: words at a time, rows whose sums are kept, rows of a tile


@pytest.fixture(params=native.available_variants(), autouse=True)
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def laid_out(weight_OI: Tensor) -> Panels:
    return in_panels(weight_OI, torch.empty(panels_shape(weight_OI.shape, weight_OI.dtype), dtype=weight_OI.dtype))


def all_laid_out(weights: Sequence[Tensor]) -> list[Panels]:
    return [laid_out(weight) for weight in weights]


def assert_matches_definition(x_RI: Tensor, weights: list[Tensor], biases: list[Tensor] | None, chain_rows) -> Tensor:
    result = chain_linear(x_RI, all_laid_out(weights), biases, chain_rows)
    tolerance.linear(x_RI, weights, biases, chain_rows).check(result)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_panel_has_a_word_of_each_output_side_by_side(dtype):
    num_outs, num_ins = PANEL_OUTPUTS + 2, 5
    weight = torch.arange(num_outs * num_ins).view(num_outs, num_ins).to(dtype)
    panels = laid_out(weight).panels
    words = 3 if dtype == torch.bfloat16 else 5
    assert panels.shape == (2, words, PANEL_OUTPUTS, 6 // words)
    flat = panels.flatten(2)  # panel, word, elements
    per_word = panels.shape[3]
    assert flat[0, 1, : 2 * per_word].tolist() == [
        *weight[0, per_word : 2 * per_word],
        *weight[1, per_word : 2 * per_word],
    ]
    assert not panels[1, :, 2:].any()
    assert per_word == 1 or not panels[:, -1, :, 1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (32, 4), (33, 7), (96, 10)])
def test_rows_and_single_rows_come_back_as_they_were(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    panels = laid_out(weight)
    assert (panels.shape, panels.dtype) == (weight.shape, dtype)
    assert torch.equal(panels.rows(), weight)
    wanted = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    assert torch.equal(panels.select(wanted), weight[wanted])


def test_a_weight_of_another_dtype_is_rounded_on_its_way():
    weight = torch.randn(40, 6)
    panels = in_panels(weight, torch.empty(panels_shape(weight.shape, torch.bfloat16), dtype=torch.bfloat16))
    assert torch.equal(panels.rows(), weight.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_dim", [1, 2, 7, 31, 64, DEPTH - 1, DEPTH, 2 * DEPTH, 2 * DEPTH + 1, 5 * DEPTH + 3])
@pytest.mark.parametrize("out_dim", [1, PANEL_OUTPUTS - 1, PANEL_OUTPUTS, PANEL_OUTPUTS + 1, 97])
def test_every_width_matches(out_dim, in_dim, dtype):
    x_RI, weights, biases = inputs(3, [in_dim], [out_dim], dtype)
    assert_matches_definition(x_RI, weights, None, (3,))
    assert_matches_definition(x_RI, weights, biases, (3,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, *range(1, 2 * TILE + 2), 31, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP + 5])
def test_every_number_of_rows_matches_and_a_row_gets_the_bits_that_it_gets_alone(num_rows, dtype):
    x_RI, weights, biases = inputs(num_rows, [40, 27], [30, 43], dtype)
    together = assert_matches_definition(x_RI, weights, biases, (num_rows, num_rows // 2))
    if library_variant(dtype) == "torch":
        return
    panels = all_laid_out(weights)
    for row in {0, num_rows // 3, num_rows - 1} & set(range(num_rows)):
        chains = 1 + (row < num_rows // 2)
        x, width = x_RI[row : row + 1], weights[chains - 1].shape[1]
        alone = chain_linear(x[:, :width], panels[:chains], biases[:chains], (1,) * chains)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain_rows", [(5, 3, 1), (16, 5, 0), (4, 0, 0), (70, 66, 1)])
def test_chains_serve_their_rows_and_leave_zeros_to_the_others(chain_rows, dtype):
    out_dims = [37, 8, 65]
    x_RI, weights, _ = inputs(chain_rows[0], [33, 16, 7], out_dims, dtype)
    result = assert_matches_definition(x_RI, weights, None, chain_rows)
    for part, rows in zip(result.split(out_dims, dim=1), chain_rows, strict=True):
        assert not part[rows:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_next_chain_reads_beside_an_odd_width_does_not_matter(dtype):
    """A word of bf16 then has one input of each chain, and zero times NaN is NaN."""
    x_RI, weights, _ = inputs(9, [33, 8], [40, 5], dtype)
    before = chain_linear(x_RI[:, :33], all_laid_out(weights[:1]), None, (9,))
    x_RI[:, 33:] = float("nan")
    after, _ = joint_linear(x_RI, [(all_laid_out(weights[:1]), None, (9,)), (all_laid_out(weights), None, (9, 9))])
    assert torch.equal(after, before) or library_variant(dtype) == "torch"
    assert after.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_x_gives_the_same_bits(dtype):
    wide, weights, _ = inputs(5, [46], [19], dtype)
    store = torch.full((10, 61), float("nan"), dtype=dtype)
    store[::2, 3:49] = wide
    result = assert_matches_definition(store[::2, 3:49], weights, None, (5,))
    if library_variant(dtype) != "torch":
        assert torch.equal(result, chain_linear(wide, all_laid_out(weights), None, (5,)))
    turned = wide.t().contiguous().t()  # features far apart: left to PyTorch
    assert_matches_definition(turned, weights, None, (5,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    before = torch.get_num_threads()
    x_RI, weights, _ = inputs(5, [576, 97], [1531, 1009], dtype)
    panels, results = all_laid_out(weights), []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            results.append(chain_linear(x_RI, panels, None, (5, 3)))
        finally:
            torch.set_num_threads(before)
    tolerance.linear(x_RI, weights, None, (5, 3)).check(results[0])
    if library_variant(dtype) != "torch":
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_gate_and_up_in_panels_match(num_rows, dtype):
    x_RI, gates, gate_biases = inputs(num_rows, [40, 24], [33, 20], dtype)
    ups, up_biases = [torch.randn_like(gate) for gate in gates], [torch.randn_like(bias) for bias in gate_biases]
    gate, up = ((ws, bs, (num_rows, 2)) for ws, bs in ((gates, gate_biases), (ups, up_biases)))
    result = swiglu_linear(x_RI, *((all_laid_out(ws), bs, rows) for ws, bs, rows in (gate, up)))
    tolerance.swiglu_linear(x_RI, gate, up).check(result)


def test_panels_pay_where_the_library_multiplies_by_them(variant):
    assert pays(torch.float32) == (variant != "torch")
    assert pays(torch.bfloat16) == (variant != "torch")
    assert not pays(torch.float64)
