"""Linear (chain) of many rows: the library against the definition, and what is left to PyTorch.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
from colm_kernels import native, packed_linear, tolerance
from colm_kernels.chain_linear import chain_linear, joint_linear, swiglu_linear
from colm_kernels.few_rows_linear import MAX_ROWS_OF_PAIRS
from colm_kernels.native import use_variant
from colm_kernels.packed_linear import INPUT_MULTIPLE, takes
from torch import Tensor

from tests.kernel_inputs import staircase_inputs

pytestmark = pytest.mark.kernels

BF16 = torch.bfloat16
MIN_ROWS = MAX_ROWS_OF_PAIRS + 1  # fewer are few_rows_linear's
PANEL, TILE_ROWS, DEPTH = 64, 6, 2048  # packed.h: outputs, rows and inputs taken at once
NARROW_OUTPUTS, NARROW_DEPTH, NARROW_ROWS = 128, 256, 252  # the same with AVX2, and an item's rows
LIBRARY_VARIANTS = [name for name in native.available_variants() if name in ("avx2", "avx512_bf16")]
NEEDS_LIBRARY = pytest.mark.skipif(not LIBRARY_VARIANTS, reason="the variants of this run leave many rows to PyTorch")


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


@pytest.fixture(params=LIBRARY_VARIANTS)
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_variant(request.param):
        yield


@pytest.fixture(params=[1, 2, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(num_rows: int, in_dims: Sequence[int], out_dims: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x_RI, weights, biases; outputs have a spread of about one."""
    x_RI, weights, biases = staircase_inputs(num_rows, in_dims, out_dims, BF16)
    return x_RI, [weight / weight.shape[1] ** 0.5 for weight in weights], biases


def assert_matches_definition(x_RI: Tensor, *staircase) -> Tensor:
    result = chain_linear(x_RI, *staircase)
    tolerance.linear(x_RI, *staircase).check(result)
    return result


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("in_dim", [32, 64, NARROW_DEPTH, NARROW_DEPTH + 32, 480, DEPTH, DEPTH + 32, 2 * DEPTH + 64])
@pytest.mark.parametrize(
    "out_dim", [1, 15, 16, PANEL - 1, PANEL, PANEL + 1, NARROW_OUTPUTS, NARROW_OUTPUTS + 1, 3 * PANEL + 17]
)
def test_every_width_matches(out_dim, in_dim):
    x_RI, weights, biases = inputs(MIN_ROWS, [in_dim], [out_dim])
    assert_matches_definition(x_RI, weights, None, (MIN_ROWS,))
    assert_matches_definition(x_RI, weights, biases, (MIN_ROWS,))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    "num_rows", [17, *range(MIN_ROWS - 1, MIN_ROWS + TILE_ROWS + 1), NARROW_ROWS, NARROW_ROWS + 1, 383, 1031]
)
def test_every_number_of_rows_matches(num_rows):
    x_RI, weights, biases = inputs(num_rows, [64], [70])
    assert_matches_definition(x_RI, weights, biases, (num_rows,))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("chain_rows", [(80, 80, 80), (80, 67, 1), (97, 0, 0), (70, 70, 3)])
def test_chains_serve_their_rows_and_leave_zeros_to_the_others(chain_rows):
    out_dims = [70, 8, 33]
    x_RI, weights, biases = inputs(chain_rows[0] + 2, [64, 32, 96], out_dims)
    result = assert_matches_definition(x_RI, weights, biases, chain_rows)
    for part, rows in zip(result.split(out_dims, dim=1), chain_rows, strict=True):
        assert not part[rows:].any()


@pytest.mark.usefixtures("variant", "num_threads")
def test_work_divided_over_threads_matches():
    assert_matches_definition(*inputs(1031, [96, 64], [200, 130])[:2], None, (1031, 700))


@NEEDS_LIBRARY
@pytest.mark.usefixtures("library")
def test_the_number_of_threads_and_the_other_rows_do_not_change_a_bit():
    x_RI, weights, biases = inputs(1500, [DEPTH, 64], [200, 130])
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            results.append(chain_linear(x_RI, weights, biases, (1500, 1400)))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    alone = chain_linear(x_RI[601 : 601 + MIN_ROWS], weights, biases, (MIN_ROWS, MIN_ROWS))
    assert torch.equal(alone, results[0][601 : 601 + MIN_ROWS])


@pytest.mark.usefixtures("variant")
def test_strided_x_is_read_in_place():
    wide, weights, _ = inputs(80, [64], [70])
    store = torch.full((160, 90), float("nan"), dtype=BF16)
    store[::2, 4:68] = wide
    assert_matches_definition(store[::2, 4:68], weights, None, (80,))


@pytest.mark.usefixtures("variant")
def test_nan_stays_in_its_row_chain_and_output():
    x_RI, weights, _ = inputs(80, [64, 32], [70, 10])
    clean = chain_linear(x_RI, weights, None, (80, 80))
    x_RI[7, 65] = float("nan")  # of chain 2
    result = chain_linear(x_RI, weights, None, (80, 80))
    assert torch.equal(result[:, :70], clean[:, :70])
    assert result[7, 70:].isnan().all()
    assert result[[*range(7), *range(8, 80)]].isfinite().all()
    x_RI[7, 65] = 1
    weights[0][69, 3] = float("nan")  # the last output of its panel, which the packing repeats
    result = chain_linear(x_RI, weights, None, (80, 80))
    assert result[:, 69].isnan().all()
    assert result[:, [*range(69), *range(70, 80)]].isfinite().all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("num_rows", [5, 16, 40, 80, 400])
@pytest.mark.parametrize("with_biases", [False, True])
def test_staircases_of_one_x_match_the_definition_together(with_biases, num_rows):
    x_RI, weights, biases = inputs(num_rows, [64, 32], [70, 8])
    _, few_weights, few_biases = inputs(num_rows, [64], [33])
    staircases = [
        (weights, biases if with_biases else None, (num_rows, num_rows - 1)),
        (few_weights, few_biases if with_biases else None, (num_rows - 2,)),
    ]
    for result, staircase in zip(joint_linear(x_RI, staircases), staircases, strict=True):
        tolerance.linear(x_RI[:, : staircase[0][-1].shape[1]], *staircase).check(result)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("num_rows", [3, 40, 80, 401])
@pytest.mark.parametrize("out_dims", [[15], [31], [32], [33], [64], [70, 9], [97, 40]])
@pytest.mark.parametrize("with_biases", [False, True])
def test_swiglu_of_two_staircases_matches_the_definition(with_biases, out_dims, num_rows):
    in_dims = [64, 32][: len(out_dims)]
    rows = (num_rows, num_rows - 2)[: len(out_dims)]
    x_RI, ups, up_biases = inputs(num_rows, in_dims, out_dims)
    gates = [3 * weight.flip(0) for weight in ups]
    gate_biases = [bias.flip(0) for bias in up_biases]
    gate, up = (gates, gate_biases if with_biases else None, rows), (ups, up_biases if with_biases else None, rows)
    tolerance.swiglu_linear(x_RI, gate, up).check(swiglu_linear(x_RI, gate, up))


@pytest.mark.usefixtures("variant")
def test_gate_and_up_that_differ_are_refused_by_name():
    x_RI, weights, biases = inputs(80, [64], [33])
    up = (weights, biases, (80,))
    for gate in ((weights, None, (80,)), (weights, biases, (79,)), ([weights[0][:32]], [biases[0][:32]], (80,))):
        with pytest.raises(ValueError, match="gate and up differ"):
            swiglu_linear(x_RI, gate, up)
    with pytest.raises(ValueError, match="x_RI has 64 features"):
        swiglu_linear(x_RI, ([weights[0][:, :32]], biases, (80,)), up)


@NEEDS_LIBRARY
@pytest.mark.usefixtures("library")
def test_what_the_library_does_not_take_runs_in_pytorch():
    x_RI, weights, biases = inputs(80, [64], [33])
    assert takes(x_RI, weights, biases)
    assert not takes(x_RI.float(), [weights[0].float()], ())
    assert not takes(x_RI, [weights[0].t().contiguous().t()], ())
    assert not takes(x_RI.t().contiguous().t(), weights, ())
    assert not takes(x_RI[:, : INPUT_MULTIPLE + 2], [weights[0][:, : INPUT_MULTIPLE + 2].contiguous()], ())
    weights[0].requires_grad_()
    assert not takes(x_RI, weights, biases)
    with torch.no_grad():
        assert takes(x_RI, weights, biases)


def test_x_whose_rows_begin_inside_a_word_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(packed_linear, "_variant", lambda _: "avx512_bf16")
    _, weights, _ = inputs(80, [64], [33])
    assert takes(torch.empty(80, 66, dtype=BF16)[:, 2:], weights, ())
    assert not takes(torch.empty(80, 66, dtype=BF16)[:, 1:65], weights, ())
    assert not takes(torch.empty(80, 65, dtype=BF16)[:, :64], weights, ())


def test_amx_is_left_to_pytorch(monkeypatch):
    """PyTorch's products use AMX where a CPU has it; the library does not."""
    monkeypatch.setattr(native, "default_variant", lambda _: "avx512_bf16")
    monkeypatch.setattr(packed_linear, "_variant", packed_linear._variant.__wrapped__)
    x_RI, weights, _ = inputs(80, [64], [33])
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_amx=has_amx: {"amx_bf16": has_amx})
        assert takes(x_RI, weights, ()) == (not has_amx)


@pytest.mark.parametrize("default", ["torch", "avx2", "avx512", "avx512_bf16"])
def test_a_machine_without_fast_products_of_pairs_takes_what_it_has(monkeypatch, default):
    """Bug: without a bf16 unit PyTorch multiplied 17 to 255 rows of bf16 at a fifth of the speed of fp32."""
    monkeypatch.setattr(native, "default_variant", lambda _: default)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    expected = {"avx2": "avx2", "avx512_bf16": "avx512_bf16"}.get(default)
    assert packed_linear._variant.__wrapped__(None) == expected
    x_RI, weights, _ = inputs(80, [64], [33])
    monkeypatch.setattr(packed_linear, "_variant", packed_linear._variant.__wrapped__)
    assert takes(x_RI, weights, ()) == (expected is not None)
