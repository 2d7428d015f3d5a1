"""Linear (chain): every variant against the definition, and each row's result beside any other rows.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

import threading
from collections.abc import Iterator

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.chain_linear import chain_linear, joint_linear
from colm_kernels.few_rows_linear import MAX_ROWS, MAX_ROWS_OF_PAIRS, variant_for
from colm_kernels.native import use_variant
from torch import Tensor

from tests.kernel_inputs import staircase_inputs as inputs
from tests.library import VARIANTS

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)
OUTS, SEGMENT = 4, 2048  # linear.h: outputs of one tile, inputs of one segment


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def assert_matches_definition(x_RI: Tensor, weights: list[Tensor], biases: list[Tensor] | None, chain_rows) -> Tensor:
    result = chain_linear(x_RI, weights, biases, chain_rows)
    tolerance.linear(x_RI, weights, biases, chain_rows).check(result)
    return result


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_dim", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 97, 576, SEGMENT, SEGMENT + 33])
@pytest.mark.parametrize("out_dim", [1, 2, OUTS - 1, OUTS, OUTS + 1, 61])
def test_every_width_matches(out_dim, in_dim, dtype):
    x_RI, weights, biases = inputs(3, [in_dim], [out_dim], dtype)
    assert_matches_definition(x_RI, weights, None, (3,))
    assert_matches_definition(x_RI, weights, biases, (3,))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, *range(1, 19), 37, MAX_ROWS_OF_PAIRS, MAX_ROWS_OF_PAIRS + 1])
def test_every_number_of_rows_matches(num_rows, dtype):
    x_RI, weights, biases = inputs(num_rows, [40, 27], [30, 13], dtype)
    assert_matches_definition(x_RI, weights, None, (num_rows, num_rows))
    assert_matches_definition(x_RI, weights, biases, (num_rows, num_rows))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain_rows", [(1, 1, 1), (5, 5, 5), (5, 3, 1), (7, 7, 1), (16, 5, 4), (4, 0, 0), (20, 3, 1)])
def test_chains_serve_their_rows_and_leave_zeros_to_the_others(chain_rows, dtype):
    out_dims = [21, 8, 5]
    x_RI, weights, _ = inputs(chain_rows[0], [33, 16, 7], out_dims, dtype)
    result = assert_matches_definition(x_RI, weights, None, chain_rows)
    for part, rows in zip(result.split(out_dims, dim=1), chain_rows, strict=True):
        assert not part[rows:].any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_before_the_first_chain_may_be_fewer_than_x_has(dtype):
    x_RI, weights, _ = inputs(4, [9], [11], dtype)
    result = chain_linear(x_RI, weights, None, (2,))
    assert torch.equal(result[:2], chain_linear(x_RI[:2], weights, None, (2,)))
    assert not result[2:].any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_work_divided_over_threads_matches(num_threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x_RI, weights, _ = inputs(2, [576, 97], [1531, 1009], dtype)
        assert_matches_definition(x_RI, weights, None, (2, 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    before = torch.get_num_threads()
    x_RI, weights, _ = inputs(5, [576, 97], [1531, 1009], dtype)
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            results.append(chain_linear(x_RI, weights, None, (5, 3)))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_inputs_give_the_bias_and_no_outputs_an_empty_result(dtype):
    bias = torch.randn(5).to(dtype)
    result = chain_linear(torch.empty(2, 0, dtype=dtype), [torch.empty(5, 0, dtype=dtype)], [bias], (2,))
    assert torch.equal(result, bias.expand(2, 5))
    nothing = chain_linear(torch.ones(2, 5, dtype=dtype), [torch.empty(0, 5, dtype=dtype)], None, (2,))
    assert nothing.shape == (2, 0)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_row_longer_than_an_item_is_handled(dtype):
    assert_matches_definition(*inputs(2, [40_009], [6], dtype)[:2], None, (2,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_x_is_read_in_place(variant, dtype):
    wide, weights, _ = inputs(5, [47], [19], dtype)
    store = torch.full((10, 61), float("nan"), dtype=dtype)
    store[::2, 3:50] = wide
    x_RI = store[::2, 3:50]
    result = assert_matches_definition(x_RI, weights, None, (5,))
    if variant != "torch":  # PyTorch's products may sum in another order in another layout
        assert torch.equal(result, chain_linear(wide, weights, None, (5,)))
    turned = wide.t().contiguous().t()  # features far apart: left to PyTorch
    assert variant_for(turned, weights, None) == "torch"
    assert_matches_definition(turned, weights, None, (5,))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_bits_in_any_company(dtype):
    x_RI, weights, biases = inputs(16, [70, 29, 13], [33, 18, 9], dtype)
    together = chain_linear(x_RI, weights, biases, (16, 11, 6))
    for row in range(16):
        num_chains = 1 + (row < 11) + (row < 6)
        width = weights[num_chains - 1].shape[1]
        alone = chain_linear(x_RI[row : row + 1, :width], weights[:num_chains], biases[:num_chains], (1,) * num_chains)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_zero_weights_give_exactly_zero_beside_a_full_chain(variant, num_rows, dtype):
    x_RI, weights, _ = inputs(num_rows, [33, 30], [20, 20], dtype)
    weights[1].zero_()
    result = assert_matches_definition(x_RI, weights, None, (num_rows, num_rows))
    assert not result[:, 20:].any()
    if variant != "torch":  # PyTorch's products may sum in another order beside other columns
        assert torch.equal(result[:, :20], chain_linear(x_RI[:, :33], weights[:1], None, (num_rows,)))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row_chain_and_output(value, dtype):
    x_RI, weights, _ = inputs(6, [37, 9], [18, 10], dtype)
    clean = chain_linear(x_RI, weights, None, (6, 6))
    x_RI[2, 40] = value  # an input of chain 2, in the vector in which those of chain 1 end
    result = chain_linear(x_RI, weights, None, (6, 6))
    assert torch.equal(result[:, :18], clean[:, :18])
    assert not result[2, 18:].isfinite().any()
    x_RI[2, 40] = 1
    weights[0][5, 36] = value
    result = chain_linear(x_RI, weights, None, (6, 6))
    assert not result[:, 5].isfinite().any()
    others = [output for output in range(28) if output != 5]
    assert result[:, others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_numbers_and_the_smallest_survive(library, dtype):
    limits = torch.finfo(dtype)
    is_in_pairs = library == "avx512_bf16" and dtype == torch.bfloat16  # which have no subnormal numbers
    smallest = limits.smallest_normal / (1 if is_in_pairs else 4)
    x_RI = torch.tensor([[limits.max, 0], [0, smallest]], dtype=dtype)
    weights = [torch.eye(2, dtype=dtype)]
    assert torch.equal(chain_linear(x_RI, weights, None, (2,)), x_RI)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 20])
@pytest.mark.parametrize("with_biases", [(False, False), (True, True), (True, False)])
def test_staircases_of_one_x_get_the_bits_that_each_gets_alone(with_biases, num_rows, dtype):
    x_RI, weights, biases = inputs(num_rows, [33, 16], [21, 8], dtype)
    _, few_weights, few_biases = inputs(num_rows, [33], [13], dtype)
    x_RI[0, 40] = float("nan")  # of chain 2, which the second staircase does not read
    staircases = [
        (weights, biases if with_biases[0] else None, (num_rows, num_rows - 1)),
        (few_weights, few_biases if with_biases[1] else None, (num_rows,)),
    ]
    for result, staircase in zip(joint_linear(x_RI, staircases), staircases, strict=True):
        alone = chain_linear(x_RI[:, : staircase[0][-1].shape[1]], *staircase)
        assert torch.equal(result.nan_to_num(7), alone.nan_to_num(7))
        assert result.stride(1) == 1


@pytest.mark.usefixtures("variant")
def test_a_staircase_that_does_not_fit_beside_another_is_refused_by_name():
    x_RI, weights, biases = inputs(3, [20, 10], [8, 4], torch.float32)
    with pytest.raises(ValueError, match=r"weights\[1\] has shape"):
        joint_linear(x_RI[:, :25], [(weights[:1], None, (3,)), (weights, biases, (3, 2))])
    with pytest.raises(ValueError, match="weights has 0 chains"):
        joint_linear(x_RI, [([], None, ())])


def test_python_threads_may_call_at_once(variant):
    cases = [inputs(1 + 3 * i, [576], [1000 + i], torch.bfloat16) for i in range(2)]
    expected = [chain_linear(x_RI, weights, None, (x_RI.shape[0],)) for x_RI, weights, _ in cases]
    results: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        x_RI, weights, _ = cases[i]
        with use_variant(variant):
            results[i] = [chain_linear(x_RI, weights, None, (x_RI.shape[0],)) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert all(torch.equal(result, expected[i]) for i, several in results.items() for result in several)


@pytest.mark.usefixtures("library")
def test_what_the_library_does_not_take_runs_in_pytorch():
    x_RI, weights, biases = inputs(2, [40], [12], torch.float32)
    assert variant_for(x_RI, weights, biases) != "torch"
    assert variant_for(x_RI.double(), [weights[0].double()], None) == "torch"
    assert variant_for(x_RI, [weights[0].t().contiguous().t()], None) == "torch"
    assert variant_for(x_RI.repeat(1 + MAX_ROWS, 1), weights, None) == "torch"
    assert variant_for(x_RI[:0], weights, None) == "torch"
    weights[0].requires_grad_()
    assert variant_for(x_RI, weights, None) == "torch"
    with torch.no_grad():
        assert variant_for(x_RI, weights, None) != "torch"


def test_pairs_of_bf16_take_more_rows_than_widened_ones(library):
    x_RI, weights, _ = inputs(MAX_ROWS_OF_PAIRS, [40], [12], torch.bfloat16)
    assert variant_for(x_RI[:MAX_ROWS], weights, None) == library
    assert variant_for(x_RI, weights, None) == (library if library == "avx512_bf16" else "torch")
    assert variant_for(x_RI.repeat(2, 1), weights, None) == "torch"


@pytest.mark.usefixtures("variant")
def test_gradients_flow_where_they_are_asked_for():
    x_RI, weights, biases = inputs(3, [20, 10], [8, 4], torch.float32)
    for tensor in (x_RI, *weights, *biases):
        tensor.requires_grad_()
    chain_linear(x_RI, weights, biases, (3, 2)).sum().backward()
    assert all(tensor.grad is not None for tensor in (x_RI, *weights, *biases))


def test_a_machine_without_the_library_falls_back(monkeypatch):
    monkeypatch.setattr(native, "default_variant", lambda _dtype: "torch")
    x_RI, weights, biases = inputs(2, [40, 9], [12, 5], torch.bfloat16)
    assert variant_for(x_RI, weights, biases) == "torch"
    assert_matches_definition(x_RI, weights, biases, (2, 1))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b, rows: (x[0], w, b, rows), "x_RI has shape"),
        (lambda x, w, b, rows: (x[:, :-1], w, b, rows), r"weights\[1\] has shape"),
        (lambda x, w, b, rows: (torch.cat((x, x), 1), w, b, rows), "x_RI has 60 features"),
        (lambda x, w, b, rows: (x, [w[0], w[1][0]], b, rows), r"weights\[1\] has shape"),
        (lambda x, w, _b, rows: (x, w[::-1], None, rows), r"weights\[1\] has shape"),
        (lambda x, w, b, rows: (x, w[:1], b, rows), "weights has 1 chains and chain_rows 2"),
        (lambda x, _w, _b, _rows: (x, [], None, ()), "weights has 0 chains"),
        (lambda x, w, b, rows: (x, w, b[:1], rows), "biases has 1 chains"),
        (lambda x, w, b, rows: (x, w, [b[0], b[1][:2]], rows), r"biases\[1\] has shape"),
        (lambda x, w, b, _rows: (x, w, b, (4, 1)), r"chain_rows\[0\]=4"),
        (lambda x, w, b, _rows: (x, w, b, (1, 2)), r"chain_rows\[1\]=2"),
        (lambda x, w, b, _rows: (x, w, b, (2, -1)), r"chain_rows\[1\]=-1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = inputs(3, [20, 10], [8, 4], torch.float32)
    with pytest.raises(ValueError, match=message):
        chain_linear(*change(*arguments, (3, 2)))
