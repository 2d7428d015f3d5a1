"""Dense prefill attention in Triton, against the definition, within the budget of tolerance.py."""

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.gpu.prefill_attention import MAX_HEAD_DIM, config, prefill_attention
from torch import Tensor

from tests.gpu import TRITON_DTYPES as DTYPES
from tests.kernel_inputs import prefill_inputs as inputs

pytestmark = pytest.mark.usefixtures("where_triton_runs")

BLOCK_M, BLOCK_N = config(80, torch.float32, 16).blocks.values()


def assert_matches_definition(q: Tensor, k: Tensor, v: Tensor) -> None:
    tolerance.check_all(tolerance.prefill_attention(q, k, v), prefill_attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, BLOCK_N - 1, BLOCK_N, BLOCK_N + 1, 61, BLOCK_M, BLOCK_M + 1])
def test_whole_sequence_matches_at_lengths_around_the_blocks(length, dtype):
    assert_matches_definition(*inputs(length, length, 2, 1, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 47])
@pytest.mark.parametrize("num_prefix", [1, 63, 64, 65, 131])
def test_tile_after_a_prefix_matches(num_queries, num_prefix, dtype):
    assert_matches_definition(*inputs(num_queries, num_prefix + num_queries, 2, 2, 16, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128])
def test_every_head_dim_matches(head_dim, dtype):
    assert_matches_definition(*inputs(19, 53, 2, 1, head_dim, dtype))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_grouped_queries_read_their_own_kv_head(group):
    assert_matches_definition(*inputs(23, 50, 2 * group, 2, 16, torch.float32))


def test_slices_of_longer_buffers_are_read_in_place():
    q, k, v = inputs(40, 100, 4, 2, 64, torch.float16)
    expected = prefill_attention(q, k, v)
    storage = torch.full((2, 120, 2, 64), float("nan"), dtype=torch.float16)
    storage[0, :100], storage[1, :100] = k.transpose(0, 1), v.transpose(0, 1)
    wide_q = torch.full((40, 8, 64), float("nan"), dtype=torch.float16)
    wide_q[:, 2:6] = q
    out, lse = prefill_attention(wide_q[:, 2:6], *(storage[i, :100].transpose(0, 1) for i in (0, 1)))
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_keys_past_two_to_the_31_elements_are_read():
    q, k, v = inputs(3, 5, 2, 2, 16, torch.float16)
    # 4 GiB of addresses each; only the keys used are written, and the rest takes no memory.
    stride = 2**29 + 16
    far_k, far_v = (torch.empty(5 * stride, dtype=torch.float16).as_strided((2, 5, 16), (16, stride, 1)) for _ in "kv")
    far_k.copy_(k)
    far_v.copy_(v)
    assert torch.equal(prefill_attention(q, far_k, far_v)[0], prefill_attention(q, k, v)[0])


def test_future_keys_are_never_seen():
    q, k, v = inputs(50, 90, 2, 1, 16, torch.float32)
    out, lse = prefill_attention(q, k, v)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 61:], changed_v[:, 61:] = 100.0, 1e6  # keys 0 .. 60 are what query 20 and before see
    changed, changed_lse = prefill_attention(q, changed_k, changed_v)
    assert torch.equal(out[:21], changed[:21])
    assert torch.equal(lse[:21], changed_lse[:21])
    assert not torch.equal(out[21], changed[21])


def test_scores_far_apart_neither_overflow_nor_vanish():
    q, k, v = inputs(40, 100, 1, 1, 64, torch.float32)
    q, k = q * 40, k * 40
    assert_matches_definition(q, k, v)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_the_rows_that_see_them(value):
    q, k, v = inputs(100, 150, 1, 1, 16, torch.float32)
    k[0, 120, 3] = value
    v[0, 3, 5] = value
    out, _ = prefill_attention(q, k, v)
    assert not out[:, :, 5].isfinite().any()
    # Query 70 is the first to see key 120; queries of an earlier tile must not know of it.
    assert out[:BLOCK_M, :, :5].isfinite().all()


def test_no_queries_give_empty_results():
    out, lse = prefill_attention(torch.empty(0, 2, 16), torch.randn(1, 5, 16), torch.randn(1, 5, 16))
    assert out.shape == (0, 2, 16)
    assert lse.shape == (0, 2)


def test_a_head_dim_that_no_program_holds_is_refused():
    with pytest.raises(ValueError, match=f"head dim {MAX_HEAD_DIM + 1}"):
        prefill_attention(*inputs(2, 2, 1, 1, MAX_HEAD_DIM + 1, torch.float16))
