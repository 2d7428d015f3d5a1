"""Int8 keys and values: every variant is bit-equal to the definition, and the definition keeps its promises.

Shapes: T tokens, K kv heads, D head dim, S rows of the cache.
"""

from collections.abc import Iterator

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.kv_quantise import (
    dequantise_kv,
    quantise_kv,
    quantise_kv_reference,
    write_dequantised_kv,
    write_quantised_kv,
)
from colm_kernels.native import use_variant
from torch import Tensor

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)
HEAD_DIMS = [1, 2, 7, 8, 9, 15, 16, 17, 64, 80, 96, 128, 131]


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def inputs(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """x_TKD, rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(num_tokens + head_dim)
    magnitude = torch.exp(20 * torch.randn(num_tokens, num_heads, 1, generator=generator))
    return (torch.randn(num_tokens, num_heads, head_dim, generator=generator) * magnitude).to(dtype)


def bits(scale_TK: Tensor) -> Tensor:
    """The bits of a tensor, since NaN is not equal to itself."""
    return scale_TK.view(torch.int16)


def assert_bit_equal(x_TKD: Tensor) -> None:
    q_TKD, scale_TK = quantise_kv(x_TKD)
    expected_q_TKD, expected_scale_TK = quantise_kv_reference(x_TKD)
    assert torch.equal(q_TKD, expected_q_TKD)
    assert torch.equal(bits(scale_TK), bits(expected_scale_TK))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_every_shape_is_bit_equal_to_the_definition(num_tokens, head_dim, dtype):
    assert_bit_equal(inputs(num_tokens, 3, head_dim, dtype))


@pytest.mark.usefixtures("variant")
def test_every_magnitude_of_bf16_is_bit_equal_to_the_definition():
    """Each finite bf16 beside a row's largest: every tie, every subnormal, every scale that rounds."""
    every = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    smaller = every[torch.arange(0x7F80) * 7919 % 0x7F80].minimum(every)
    for rows in (torch.stack((every, -smaller), dim=1), torch.stack((-every, smaller, every * 0.37), dim=1)):
        assert_bit_equal(rows.unsqueeze(1))
        assert_bit_equal(rows.unsqueeze(1).float() * 0.9999)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_work_divided_over_threads_is_bit_equal(num_threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_bit_equal(inputs(4001, 3, 64, dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_within_half_a_scale(dtype):
    x_TKD = inputs(300, 3, 64, dtype)
    q_TKD, scale_TK = quantise_kv(x_TKD)
    assert int(q_TKD.min()) >= -127
    tolerance.quantised(x_TKD).check(dequantise_kv(q_TKD, scale_TK, torch.float32))


@pytest.mark.usefixtures("variant")
def test_the_example_of_the_docstring_holds():
    q_TKD, scale_TK = quantise_kv(torch.tensor([[[0, 127, -2.5]]]))
    assert q_TKD.tolist() == [[[0, 127, -2]]]
    assert scale_TK.item() == 1


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_come_back_as_zeros(dtype):
    q_TKD, scale_TK = quantise_kv(torch.zeros(2, 3, 64, dtype=dtype))
    assert not q_TKD.any()
    assert not scale_TK.any()
    assert not dequantise_kv(q_TKD, scale_TK, dtype).any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("head_dim", [19, 64])
def test_rows_that_are_not_finite_come_back_as_nan_and_the_others_unharmed(head_dim, value, dtype):
    x_TKD = inputs(4, 3, head_dim, dtype)
    clean_q_TKD, clean_scale_TK = quantise_kv(x_TKD)
    x_TKD[2, 1, head_dim - 1] = value
    assert_bit_equal(x_TKD)
    q_TKD, scale_TK = quantise_kv(x_TKD)
    assert not q_TKD[2, 1].any()
    assert dequantise_kv(q_TKD, scale_TK, dtype)[2, 1].isnan().all()
    others = torch.ones(4, 3, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(q_TKD[others], clean_q_TKD[others])
    assert torch.equal(scale_TK[others], clean_scale_TK[others])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_land_in_their_slots_and_nothing_else_changes(dtype):
    x_TKD = inputs(7, 3, 64, dtype)
    q_cache_SKD = torch.full((20, 3, 64), -128, dtype=torch.int8)
    scale_cache_SK = torch.full((20, 3), -1.0, dtype=torch.bfloat16)
    slots_T = torch.tensor([19, 0, 3, 4, 11, 12, 5])
    write_quantised_kv(x_TKD, q_cache_SKD, scale_cache_SK, slots_T)
    q_TKD, scale_TK = quantise_kv_reference(x_TKD)
    assert torch.equal(q_cache_SKD[slots_T], q_TKD)
    assert torch.equal(scale_cache_SK[slots_T], scale_TK)
    others = [slot for slot in range(20) if slot not in slots_T.tolist()]
    assert (q_cache_SKD[others] == -128).all()
    assert (scale_cache_SK[others] == -1).all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors_are_read_and_written(dtype):
    x_TKD = inputs(5, 3, 64, dtype)
    q_TKD, scale_TK = quantise_kv_reference(x_TKD)
    heads_first = x_TKD.transpose(0, 1).contiguous().transpose(0, 1)
    cache_KSD = torch.full((3, 9, 70), -128, dtype=torch.int8)
    scale_KS = torch.empty(3, 9, dtype=torch.bfloat16)
    inside_SKD = cache_KSD[:, 2:7, 3:67].transpose(0, 1)
    write_quantised_kv(heads_first, inside_SKD, scale_KS[:, 2:7].t())
    assert torch.equal(inside_SKD, q_TKD)
    assert torch.equal(scale_KS[:, 2:7].t(), scale_TK)
    assert (cache_KSD[:, 2:7, 67:] == -128).all()
    features_apart = x_TKD.transpose(1, 2).contiguous().transpose(1, 2)  # left to PyTorch
    assert torch.equal(quantise_kv(features_apart)[0], q_TKD)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("slots", [[0, 8], [-1, 3]])
def test_slots_outside_the_cache_are_refused_and_nothing_is_written(slots):
    q_cache_SKD, scale_cache_SK = torch.zeros(8, 3, 64, dtype=torch.int8), torch.zeros(8, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"slots {slots[0]} to {slots[1]}, outside 0 to 7"):
        write_quantised_kv(inputs(2, 3, 64, torch.float32), q_cache_SKD, scale_cache_SK, torch.tensor(slots))
    assert not q_cache_SKD.any()
    assert not scale_cache_SK.any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x_TKD": a["x_TKD"][0]}, "x_TKD has shape"),
        (lambda a: a | {"x_TKD": a["x_TKD"].double()}, "x_TKD has dtype"),
        (lambda a: a | {"x_TKD": a["x_TKD"][..., :0]}, "x_TKD has head dim 0"),
        (lambda a: a | {"q_cache_SKD": a["q_cache_SKD"][:, :2]}, "q_cache_SKD has shape"),
        (lambda a: a | {"q_cache_SKD": a["q_cache_SKD"].float()}, "q_cache_SKD has dtype"),
        (lambda a: a | {"scale_cache_SK": a["scale_cache_SK"][:4]}, "scale_cache_SK has shape"),
        (lambda a: a | {"scale_cache_SK": a["scale_cache_SK"].float()}, "scale_cache_SK has dtype"),
        (lambda a: a | {"slot_mapping_T": a["slot_mapping_T"][:1]}, "slot_mapping_T has shape"),
        (lambda a: a | {"slot_mapping_T": a["slot_mapping_T"].int()}, "slot_mapping_T is torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = {
        "x_TKD": inputs(2, 3, 64, torch.float32),
        "q_cache_SKD": torch.zeros(8, 3, 64, dtype=torch.int8),
        "scale_cache_SK": torch.zeros(8, 3, dtype=torch.bfloat16),
        "slot_mapping_T": torch.tensor([4, 1]),
    }
    with pytest.raises(ValueError, match=message):
        write_quantised_kv(**change(arguments))


PAGE_DTYPES = (*DTYPES, torch.float16)


def widened(q_TKD: Tensor, scale_TK: Tensor, dtype: torch.dtype, num_threads: int | None = None) -> Tensor:
    out_TKD = torch.full(q_TKD.shape, -1.0, dtype=dtype)
    write_dequantised_kv(q_TKD, scale_TK, out_TKD, num_threads=num_threads)
    return out_TKD


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_every_shape_is_widened_to_the_bits_of_the_definition(num_tokens, head_dim, dtype):
    q_TKD, scale_TK = quantise_kv_reference(inputs(num_tokens, 3, head_dim, torch.float32).clamp(-1e4, 1e4))
    assert torch.equal(widened(q_TKD, scale_TK, dtype), dequantise_kv(q_TKD, scale_TK, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_multiple_of_every_scale_is_widened_to_the_bits_of_the_definition(dtype):
    """Each finite scale, zero and subnormals included, times each int8: every tie of the rounding to bf16."""
    scale_TK = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).unsqueeze(1)
    q_TKD = torch.arange(-127, 128, dtype=torch.int8).expand(len(scale_TK), 1, -1)
    assert torch.equal(widened(q_TKD, scale_TK, dtype), dequantise_kv(q_TKD, scale_TK, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_widened_by_several_threads_are_those_of_one(num_threads, dtype):
    q_TKD, scale_TK = quantise_kv_reference(inputs(4001, 3, 64, dtype))
    assert torch.equal(widened(q_TKD, scale_TK, dtype, num_threads), dequantise_kv(q_TKD, scale_TK, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(4))
def test_rows_that_lie_head_by_head_at_any_address_are_widened_into_a_slice_of_the_cache(offset, dtype):
    """As they lie in a message: the keys of each head side by side, the scales behind them."""
    q_TKD, scale_TK = quantise_kv_reference(inputs(5, 3, 64, dtype))
    numbers, scales = (
        bytearray(offset) + each.transpose(0, 1).contiguous().view(torch.uint8).numpy().tobytes()
        for each in (q_TKD, scale_TK)
    )
    q_KTD = torch.frombuffer(numbers, dtype=torch.int8, offset=offset).view(3, 5, 64)
    scale_KT = torch.frombuffer(scales, dtype=torch.bfloat16, offset=offset).view(3, 5)
    cache_SKD = torch.full((9, 3, 70), -1.0, dtype=dtype)
    write_dequantised_kv(q_KTD.transpose(0, 1), scale_KT.t(), cache_SKD[2:7, :, 3:67], num_threads=1)
    assert torch.equal(cache_SKD[2:7, :, 3:67], dequantise_kv(q_TKD, scale_TK, dtype))
    cache_SKD[2:7, :, 3:67] = -1
    assert (cache_SKD == -1).all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
def test_rows_with_the_scale_nan_are_widened_to_nan(dtype):
    scale_TK = torch.tensor([[1.0], [float("nan")]], dtype=torch.bfloat16)
    out_TKD = widened(torch.zeros(2, 1, 19, dtype=torch.int8), scale_TK, dtype)
    assert not out_TKD[0].any()
    assert out_TKD[1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"q_TKD": a["q_TKD"][0]}, "q_TKD has shape"),
        (lambda a: a | {"q_TKD": a["q_TKD"].float()}, "q_TKD has dtype"),
        (lambda a: a | {"scale_TK": a["scale_TK"][:1]}, "scale_TK has shape"),
        (lambda a: a | {"scale_TK": a["scale_TK"].float()}, "scale_TK has dtype"),
        (lambda a: a | {"out_TKD": a["out_TKD"][..., :63]}, "out_TKD has shape"),
        (lambda a: a | {"out_TKD": a["out_TKD"].double()}, "out_TKD has dtype"),
        (lambda a: a | {"num_threads": 0}, "num_threads=0"),
    ],
)
def test_what_cannot_be_widened_is_refused_by_name(change, message):
    arguments = {
        "q_TKD": torch.zeros(2, 3, 64, dtype=torch.int8),
        "scale_TK": torch.zeros(2, 3, dtype=torch.bfloat16),
        "out_TKD": torch.zeros(2, 3, 64),
    }
    with pytest.raises(ValueError, match=message):
        write_dequantised_kv(**change(arguments))
