"""Quantised weights: their numbers, how they lie in panels, and every variant's products against the exact ones.

Shapes: R rows, I input features of the active chains, O output features of the active chains, G groups of inputs.
"""

from collections.abc import Iterator, Sequence
from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.chain_linear import chain_linear, joint_linear, swiglu_linear
from colm_kernels.native import use_variant
from colm_kernels.panels import PANEL_OUTPUTS, in_panels, panels_shape
from colm_kernels.quantised import (
    GROUP_INPUTS,
    Quantisation,
    QuantisedPanels,
    in_quantised_panels,
    quantise,
    quantised_shape,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_inputs import staircase_inputs as inputs

pytestmark = pytest.mark.kernels

KINDS: tuple[Quantisation, ...] = get_args(Quantisation)
DTYPES = (torch.bfloat16, torch.float32)
TILE, KEPT_ROWS, GROUPS_AT_ONCE = 8, 64, 16  # quantised_panel.h
HALF = 2.0**-11  # unit roundoff of fp16
LEAST_HALF = 2.0**-25  # half of its smallest number


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def laid_out(weight_OI: Tensor, kind: Quantisation, dtype: torch.dtype) -> QuantisedPanels:
    # Full of ones, so that whatever is not written shows.
    stored = torch.full(quantised_shape(weight_OI.shape, kind), 255, dtype=torch.uint8)
    return in_quantised_panels(weight_OI, stored, dtype, kind)


def all_laid_out(weights: Sequence[Tensor], kind: Quantisation) -> list[QuantisedPanels]:
    return [laid_out(weight, kind, weight.dtype) for weight in weights]


def step_and_ends(weight: Tensor, kind: Quantisation) -> tuple[float, float]:
    """A step of the span's grid, and how far rounding scale and minimum may leave the ends of the range outside it."""
    largest, span = (127, float(weight.abs().max())) if kind == "int8" else (15, float(weight.max() - weight.min()))
    step = span / largest
    ends = largest * max(step * HALF, LEAST_HALF) + 1e-6 * float(weight.abs().max())
    return step, ends + (0.0 if kind == "int8" else max(abs(float(weight.min())) * HALF, LEAST_HALF))


WEIGHTS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=GROUP_INPUTS, max_size=GROUP_INPUTS)
FACTORS = st.sampled_from([1.0, 1e-3, 1e-6, 1e-9])


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, FACTORS)
def test_a_weight_of_int8_is_off_by_half_a_step_and_what_fp16_rounds(values: list[float], factor: float) -> None:
    weight = torch.tensor([values]) * factor
    blocks = quantise(weight, "int8")
    step, ends = step_and_ends(weight, "int8")
    assert (blocks.weight() - weight.double()).abs().max() <= 0.5 * step + ends
    assert blocks.q_OI.abs().max() <= 127


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, FACTORS)
def test_weights_of_q4_are_off_by_no_more_than_half_a_step_together(values: list[float], factor: float) -> None:
    """A fit may move the ends of the range to bring the others nearer."""
    weight = torch.tensor([values]) * factor
    blocks = quantise(weight, "q4")
    step, ends = step_and_ends(weight, "q4")
    error = (blocks.weight() - weight.double()).square().mean().sqrt()
    assert error <= 0.5 * step + ends
    assert 0 <= blocks.q_OI.min() <= blocks.q_OI.max() <= 15


def test_weights_on_no_grid_are_nearer_to_fitted_numbers_than_to_those_of_their_span() -> None:
    weight = torch.randn(64, 8 * GROUP_INPUTS, generator=torch.Generator().manual_seed(2))
    of_gguf = gguf.dequantize(
        gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1
    )
    ours = (quantise(weight, "q4").weight() - weight).square().sum()
    theirs = (torch.from_numpy(of_gguf) - weight).square().sum()
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_of_a_group_come_back(kind: Quantisation) -> None:
    weight = torch.tensor([0.0, 0.5, -2.0]).repeat_interleave(GROUP_INPUTS).unsqueeze(0)
    assert torch.allclose(quantise(weight, kind).weight().float(), weight, atol=0, rtol=HALF)


@pytest.mark.parametrize("rounded", [False, True], ids=["in fp32", "bf16 weights and in bf16"])
@pytest.mark.parametrize(("kind", "stored"), [("int8", "Q8_0"), ("q4", "Q4_1")])
def test_what_was_dequantised_from_a_gguf_block_gives_that_block_again(
    kind: Quantisation, stored: str, *, rounded: bool
) -> None:
    """In bf16 too, if the block was made of bf16 weights: its ends are such numbers."""
    stored_type = gguf.GGMLQuantizationType[stored]
    drawn = torch.randn(64, 8 * GROUP_INPUTS, generator=torch.Generator().manual_seed(0)) * 0.05
    data = gguf.quantize((drawn.bfloat16().float() if rounded else drawn).numpy(), stored_type)
    given_back = torch.from_numpy(gguf.dequantize(data, stored_type))
    blocks = quantise(given_back.bfloat16() if rounded else given_back, kind)
    data = data.reshape(64, 8, -1)
    assert np.array_equal(data[..., :2].copy().view(np.float16)[..., 0], blocks.scale_OG.numpy())
    q_OGI = blocks.q_OI.view(64, 8, GROUP_INPUTS).numpy()
    if kind == "int8":
        assert np.array_equal(data[..., 2:].copy().view(np.int8), q_OGI)
        return
    assert blocks.minimum_OG is not None
    assert np.array_equal(data[..., 2:4].copy().view(np.float16)[..., 0], blocks.minimum_OG.numpy())
    nibbles = np.concatenate([data[..., 4:] & 15, data[..., 4:] >> 4], axis=2)
    assert np.array_equal(nibbles, q_OGI)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_no_group_holds_are_refused(kind: Quantisation) -> None:
    with pytest.raises(ValueError, match="40 inputs are not a multiple of 32"):
        quantise(torch.zeros(2, 40), kind)
    with pytest.raises(ValueError, match=r"weights up to 1e\+08 are beyond fp16"):
        quantise(torch.linspace(-1e8, 1e8, GROUP_INPUTS).unsqueeze(0), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (32, 64), (33, 96), (2100, 32)])
def test_panels_hold_the_numbers_and_give_them_by_rows(shape: tuple[int, int], kind: Quantisation) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    panels, blocks = laid_out(weight, kind, torch.float32), quantise(weight, kind)
    for ours, expected in zip(panels.blocks().__getstate__(), blocks.__getstate__(), strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours, expected)
    assert torch.equal(panels.rows(), blocks.weight().float())
    wanted = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    assert torch.equal(panels.select(wanted), panels.rows()[wanted])
    assert laid_out(weight, kind, torch.bfloat16).rows().dtype == torch.bfloat16


def test_a_group_of_q4_lies_as_the_library_reads_it() -> None:
    """Scales and minima of 32 outputs, then a word of each output for every 8 inputs."""
    q = torch.arange(16).repeat(2).float().unsqueeze(0)  # output 0: scale 1, minimum 0
    stored = laid_out(torch.cat([q, 2 * q + 1]), "q4", torch.float32).stored
    assert stored.shape == (1, 1, 640)
    halves, words = stored[0, 0, :128].view(torch.float16), stored[0, 0, 128:].view(torch.int32).view(4, 32)
    assert halves[[0, 1, 32, 33]].tolist() == [1, 2, 0, 1]
    assert not halves[2:32].any()
    first = sum(((number - 8) & 15) << bit for number, bit in enumerate((0, 16, 4, 20, 8, 24, 12, 28)))
    assert int(words[0, 0]) & 0xFFFFFFFF == first == int(words[2, 1]) & 0xFFFFFFFF


def assert_matches(x_RI: Tensor, weights: Sequence[Tensor], biases, chain_rows, kind: Quantisation) -> Tensor:
    panels = all_laid_out(weights, kind)
    result = chain_linear(x_RI, panels, biases, chain_rows)
    tolerance.linear(x_RI, panels, biases, chain_rows).check(result)
    return result


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_dim", [32 * groups for groups in (1, 2, 7, GROUPS_AT_ONCE, GROUPS_AT_ONCE + 1)])
def test_every_width_matches(in_dim, dtype, kind):
    for out_dim in (1, PANEL_OUTPUTS - 1, PANEL_OUTPUTS, PANEL_OUTPUTS + 1, 97):
        x_RI, weights, biases = inputs(3, [in_dim], [out_dim], dtype)
        assert_matches(x_RI, weights, None, (3,), kind)
        assert_matches(x_RI, weights, biases, (3,), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_matches_and_a_row_gets_the_bits_that_it_gets_alone(dtype, kind, variant):
    for num_rows in [0, *range(1, 2 * TILE + 2), KEPT_ROWS - 1, KEPT_ROWS, KEPT_ROWS + 1, 2 * KEPT_ROWS + 5]:
        x_RI, weights, biases = inputs(num_rows, [64, 32], [30, 43], dtype)
        together = assert_matches(x_RI, weights, biases, (num_rows, num_rows // 2), kind)
        panels = all_laid_out(weights, kind)
        for row in {0, num_rows // 3, num_rows - 1} & set(range(num_rows if variant != "torch" else 0)):
            chains = 1 + (row < num_rows // 2)
            x, width = x_RI[row : row + 1], weights[chains - 1].shape[1]
            alone = chain_linear(x[:, :width], panels[:chains], biases[:chains], (1,) * chains)
            assert torch.equal(together[row, : alone.shape[1]], alone[0])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain_rows", [(5, 3, 1), (4, 0, 0), (70, 66, 1)])
def test_chains_serve_their_rows_and_leave_zeros_to_the_others(chain_rows, dtype, kind):
    out_dims = [37, 8, 65]
    x_RI, weights, _ = inputs(chain_rows[0], [32, 64, 32], out_dims, dtype)
    result = assert_matches(x_RI, weights, None, chain_rows, kind)
    for part, rows in zip(result.split(out_dims, dim=1), chain_rows, strict=True):
        assert not part[rows:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_reads_only_its_inputs_from_wherever_they_lie(dtype, kind, variant):
    """Beside weights that are not quantised, as keys and values are beside queries."""
    x_RI, (weight, wide), _ = inputs(9, [32, 64], [40, 5], dtype)
    plain = in_panels(weight, torch.empty(panels_shape(weight.shape, dtype), dtype=dtype))
    queries, other = laid_out(weight, kind, dtype), laid_out(wide, kind, dtype)
    expected = chain_linear(x_RI[:, :32], [queries], None, (9,)), chain_linear(x_RI[:, :32], [plain], None, (9,))
    store = torch.full((18, 111), float("nan"), dtype=dtype)
    store[::2, 3:35] = x_RI[:, :32]
    staircases = [([queries], None, (9,)), ([plain], None, (9,)), ([queries, other], None, (9, 9))]
    *results, _ = joint_linear(store[::2, 3:99], staircases)
    for result, alone, of in zip(results, expected, (queries, plain), strict=True):
        tolerance.linear(x_RI[:, :32], [of], None, (9,)).check(result)
        assert variant == "torch" or torch.equal(result, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype, kind, variant):
    before = torch.get_num_threads()
    x_RI, weights, _ = inputs(5, [576, 96], [1531, 1009], dtype)
    panels, results = all_laid_out(weights, kind), []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            results.append(chain_linear(x_RI, panels, None, (5, 3)))
        finally:
            torch.set_num_threads(before)
    tolerance.linear(x_RI, panels, None, (5, 3)).check(results[0])
    assert variant == "torch" or all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_gate_and_up_match(num_rows, kind):
    x_RI, gates, _ = inputs(num_rows, [32, 32], [33, 20], torch.float32)
    ups = [torch.randn_like(gate) for gate in gates]
    gate, up = ((all_laid_out(weights, kind), None, (num_rows, 2)) for weights in (gates, ups))
    as_stored = (([w.rows() for w in weights], biases, rows) for weights, biases, rows in (gate, up))
    tolerance.swiglu_linear(x_RI, *as_stored).check(swiglu_linear(x_RI, gate, up))
