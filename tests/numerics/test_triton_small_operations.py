"""RMSNorm (chain), rotation and cache writes, SwiGLU and int8 keys and values in Triton.

Shapes: R rows, D features or head dim, T tokens, N heads, K kv heads, S rows of the cache, F features.
"""

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.gpu.kv_quantise import quantise_kv, write_quantised_kv
from colm_kernels.gpu.rms_norm import add_rms_norm_, rms_norm
from colm_kernels.gpu.rotary import rotate_, write_kv
from colm_kernels.gpu.swiglu import swiglu_
from colm_kernels.kv_quantise import quantise_kv_reference
from torch import Tensor

from tests.gpu import HAS_GPU
from tests.gpu import TRITON_DTYPES as DTYPES

pytestmark = [
    pytest.mark.usefixtures("where_triton_runs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the interpreter
]

EPS = 1e-5


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[1], [97], [128], [129], [576, 192], [17, 5, 1, 33], [64, 64, 32]], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_every_width_is_normalised_chain_by_chain(num_rows, dims, dtype):
    x_RD, gains = 3 * draw(num_rows, sum(dims), dtype=dtype), [draw(dim, dtype=dtype) for dim in dims]
    tolerance.rms_norm(x_RD, gains, EPS).check(rms_norm(x_RD, gains, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[97], [64, 32]], ids=str)
def test_a_residual_is_added_in_place_and_the_sum_normalised(dims, dtype):
    store = draw(10, sum(dims) + 7, dtype=dtype)
    x_RD, gains = store[::2, 3:-4], [draw(dim, dtype=dtype) for dim in dims]
    delta_RD = draw(sum(dims), 5, dtype=dtype).t()
    total_RD = x_RD + delta_RD
    result = add_rms_norm_(x_RD, delta_RD, gains, EPS)
    assert torch.equal(x_RD, total_RD)
    tolerance.rms_norm(total_RD, gains, EPS).check(result)
    if not HAS_GPU:  # there they are two compilations, each with an order of its sums
        assert torch.equal(result, rms_norm(total_RD, gains, EPS))


def angles(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle_TD = (10 * draw(num_tokens, head_dim // 2)).repeat(1, 2)
    return angle_TD.cos(), angle_TD.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 64, 80, 96, 128])
@pytest.mark.parametrize("num_heads", [1, 3, 65])
def test_every_head_is_rotated_in_place(num_heads, head_dim, dtype):
    x_TND, tables = draw(3, num_heads, head_dim, dtype=dtype), angles(3, head_dim)
    expected = tolerance.rotary(x_TND, *tables)
    assert rotate_(x_TND, *tables) is x_TND
    expected.check(x_TND)


def test_queries_inside_a_wider_projection_are_rotated_and_nothing_else():
    store, tables = draw(4, 5, 16), angles(4, 16)
    before = store.clone()
    rotate_(store[:, 1:3], *tables)
    tolerance.rotary(before[:, 1:3], *tables).check(store[:, 1:3])
    assert torch.equal(store[:, [0, 3, 4]], before[:, [0, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_land_in_their_slots_and_nothing_else_changes(dtype):
    k_TKD, v_TKD, tables = draw(5, 3, 16, dtype=dtype), draw(5, 3, 16, dtype=dtype) + 1, angles(5, 16)
    slots_T = torch.tensor([35, 2, 0, 17, 16])
    caches = torch.full((2, 3, 16, 3, 16), -7.0, dtype=dtype)  # pages of 16 tokens
    k_cache_SKD, v_cache_SKD = (pages_BPKD.flatten(0, 1) for pages_BPKD in caches)
    write_kv(k_TKD, v_TKD, *tables, k_cache_SKD, v_cache_SKD, slots_T)
    rotate_(k_TKD, *tables)
    assert torch.equal(k_cache_SKD[slots_T], k_TKD)
    assert torch.equal(v_cache_SKD[slots_T], v_TKD)
    others = [slot for slot in range(48) if slot not in slots_T.tolist()]
    assert (k_cache_SKD[others] == -7).all()
    assert (v_cache_SKD[others] == -7).all()


def test_a_tile_is_written_into_a_cache_that_is_kv_head_major():
    k_TKD, v_TKD, tables = draw(4, 2, 16), draw(4, 2, 16) + 1, angles(4, 16)
    k_cache_KSD, v_cache_KSD = torch.zeros(2, 9, 16), torch.zeros(2, 9, 16)
    write_kv(k_TKD, v_TKD, *tables, *(cache[:, 3:7].transpose(0, 1) for cache in (k_cache_KSD, v_cache_KSD)))
    assert torch.equal(k_cache_KSD[:, 3:7].transpose(0, 1), rotate_(k_TKD, *tables))
    assert torch.equal(v_cache_KSD[:, 3:7].transpose(0, 1), v_TKD)
    assert not k_cache_KSD[:, [0, 2, 7, 8]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 1023, 1024, 1025])
def test_silu_of_gate_times_up_replaces_gate(dim, dtype):
    gate_RF, up_RF = 3 * draw(3, dim, dtype=dtype), draw(3, dim + 2, dtype=dtype)[:, 2:]
    expected = tolerance.swiglu(gate_RF, up_RF)
    assert swiglu_(gate_RF, up_RF) is gate_RF
    expected.check(gate_RF)


def assert_bit_equal(x_TKD: Tensor) -> None:
    q_TKD, scale_TK = quantise_kv(x_TKD)
    expected_q_TKD, expected_scale_TK = quantise_kv_reference(x_TKD)
    assert torch.equal(q_TKD, expected_q_TKD)
    assert torch.equal(scale_TK.view(torch.int16), expected_scale_TK.view(torch.int16))  # NaN is not equal to itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [1, 2, 17, 64, 80, 128])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_every_shape_is_quantised_to_the_bit(num_tokens, head_dim, dtype):
    magnitude = torch.exp(3 * draw(num_tokens, 3, 1))
    assert_bit_equal((draw(num_tokens, 3, head_dim) * magnitude).to(dtype))


def test_every_magnitude_of_bf16_is_quantised_to_the_bit():
    """Each finite bf16 beside a row's largest, as many heads: every tie, every subnormal, every scale that rounds."""
    every = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    smaller = every[torch.arange(0x7F80) * 7919 % 0x7F80].minimum(every)
    # In fp32: the interpreter reads bf16's subnormals as zero.
    rows = torch.stack((every, -smaller), dim=1).unsqueeze(0).float()
    assert_bit_equal(rows)
    assert_bit_equal(rows * 0.9999)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_get_the_scale_nan_and_zeros(value):
    x_TKD = draw(2, 3, 16)
    x_TKD[1, 1, 5] = value
    assert_bit_equal(x_TKD)
    assert_bit_equal(torch.zeros(2, 3, 16))


def test_quantised_rows_land_in_their_slots():
    x_TKD, slots_T = draw(4, 3, 16), torch.tensor([19, 0, 3, 4])
    q_cache_SKD, scale_cache_SK = torch.full((20, 3, 16), -128, dtype=torch.int8), torch.full((20, 3), -1.0).bfloat16()
    write_quantised_kv(x_TKD, q_cache_SKD, scale_cache_SK, slots_T)
    q_TKD, scale_TK = quantise_kv(x_TKD)
    assert torch.equal(q_cache_SKD[slots_T], q_TKD)
    assert torch.equal(scale_cache_SK[slots_T], scale_TK)
    others = [slot for slot in range(20) if slot not in slots_T.tolist()]
    assert (q_cache_SKD[others] == -128).all()
    assert (scale_cache_SK[others] == -1).all()


def test_caches_whose_features_lie_apart_are_refused():
    k_TKD, tables = draw(4, 2, 16), angles(4, 16)
    apart = torch.zeros(4, 16, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="v_cache_SKD has strides"):
        write_kv(k_TKD, k_TKD, *tables, torch.zeros(4, 2, 16), apart)
    with pytest.raises(ValueError, match="q_cache_SKD has strides"):
        write_quantised_kv(k_TKD, apart.to(torch.int8), torch.zeros(4, 2, dtype=torch.bfloat16))
