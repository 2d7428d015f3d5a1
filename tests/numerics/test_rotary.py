"""Rotary embedding and cache writes: every variant against the definition, and where each row is written.

Shapes: T tokens, N heads, K kv heads, D head dim, S rows of the cache, B pages, P tokens of a page.
"""

from collections.abc import Iterator

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.native import use_variant
from colm_kernels.rotary import rotate_, write_kv
from torch import Tensor

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)
HEAD_DIMS = [2, 6, 16, 30, 64, 80, 96, 128]
NUM_TOKENS = [0, 1, 2, 7, 33]


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def inputs(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """k_TKD, v_TKD, cos_TD, sin_TD."""
    generator = torch.Generator().manual_seed(num_tokens + num_heads + head_dim)
    k_TKD, v_TKD = torch.randn(2, num_tokens, num_heads, head_dim, generator=generator).to(dtype)
    angles = (7 * torch.randn(num_tokens, head_dim // 2, generator=generator)).repeat(1, 2)
    return k_TKD, v_TKD, angles.cos(), angles.sin()


def assert_matches_definition(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    expected = tolerance.rotary(x_TND, cos_TD, sin_TD)
    result = rotate_(x_TND, cos_TD, sin_TD)
    assert result is x_TND
    expected.check(result)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_every_shape_matches(num_tokens, head_dim, dtype):
    x_TND, _, cos_TD, sin_TD = inputs(num_tokens, 3, head_dim, dtype)
    assert_matches_definition(x_TND, cos_TD, sin_TD)


@pytest.mark.usefixtures("variant")
def test_a_quarter_turn_takes_each_half_to_the_other():
    x_TND = torch.tensor([[[1.0, 2, 3, 4, 5, 6]]])
    rotate_(x_TND, torch.zeros(1, 6), torch.ones(1, 6))
    assert torch.equal(x_TND, torch.tensor([[[-4.0, -5, -6, 1, 2, 3]]]))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_work_divided_over_threads_matches(num_threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x_TND, _, cos_TD, sin_TD = inputs(1531, 9, 64, dtype)
        assert_matches_definition(x_TND, cos_TD, sin_TD)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_heads_are_rotated_in_place(dtype):
    x_TND, _, cos_TD, sin_TD = inputs(5, 3, 64, dtype)
    expected = rotate_(x_TND.clone(), cos_TD, sin_TD)
    heads_first = x_TND.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(rotate_(heads_first, cos_TD, sin_TD), expected)
    store = torch.full((5, 3, 70), float("nan"), dtype=dtype)
    inside = store[:, :, 3:67]
    inside.copy_(x_TND)
    assert torch.equal(rotate_(inside, cos_TD, sin_TD), expected)
    assert store[:, :, :3].isnan().all()
    assert store[:, :, 67:].isnan().all()
    assert_matches_definition(x_TND.transpose(1, 2).contiguous().transpose(1, 2), cos_TD, sin_TD)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_a_tile_lands_in_its_slice_of_a_cache_that_is_kv_head_major(num_tokens, head_dim, dtype):
    k_TKD, v_TKD, cos_TD, sin_TD = inputs(num_tokens, 3, head_dim, dtype)
    start, stop = 5, 5 + num_tokens
    caches = torch.full((2, 3, num_tokens + 9, head_dim), float("nan"), dtype=dtype)
    tiles = [cache_KSD[:, start:stop].transpose(0, 1) for cache_KSD in caches]
    write_kv(k_TKD, v_TKD, cos_TD, sin_TD, *tiles)
    assert torch.equal(tiles[0], rotate_(k_TKD.clone(), cos_TD, sin_TD))
    assert torch.equal(tiles[1], v_TKD)
    assert caches[:, :, :start].isnan().all()
    assert caches[:, :, stop:].isnan().all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 700])
def test_tokens_land_in_their_slots_and_nothing_else_changes(num_tokens, dtype):
    k_TKD, v_TKD, cos_TD, sin_TD = inputs(num_tokens, 3, 64, dtype)
    page_tokens, num_pages = 4, num_tokens // 4 + 3
    pages = torch.full((2, num_pages, page_tokens, 3, 64), -1.0, dtype=dtype)
    slots_T = torch.randperm(num_pages * page_tokens, generator=torch.Generator().manual_seed(0))[:num_tokens]
    write_kv(k_TKD, v_TKD, cos_TD, sin_TD, *(pages_BPKD.flatten(0, 1) for pages_BPKD in pages), slots_T)
    for written, tokens_TKD in zip(pages, (rotate_(k_TKD.clone(), cos_TD, sin_TD), v_TKD), strict=True):
        expected = torch.full_like(written, -1.0)
        for slot, token_KD in zip(slots_T.tolist(), tokens_TKD, strict=True):
            expected[slot // page_tokens, slot % page_tokens] = token_KD
        assert torch.equal(written, expected)


@pytest.mark.usefixtures("variant")
def test_slots_past_2_31_elements_are_reached():
    k_TKD, v_TKD, cos_TD, sin_TD = inputs(2, 1, 128, torch.bfloat16)
    num_slots = (1 << 31) // 128 + 2
    # Untouched pages cost no memory.
    k_cache_SKD, v_cache_SKD = (torch.empty(num_slots, 1, 128, dtype=torch.bfloat16) for _ in "kv")
    write_kv(k_TKD, v_TKD, cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, torch.tensor([num_slots - 1, 0]))
    assert torch.equal(v_cache_SKD[[num_slots - 1, 0]], v_TKD)
    assert torch.equal(k_cache_SKD[[num_slots - 1, 0]], rotate_(k_TKD, cos_TD, sin_TD))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_keys_and_values_are_written(dtype):
    k_TKD, v_TKD, cos_TD, sin_TD = inputs(5, 3, 64, dtype)
    packed = torch.cat((k_TKD, v_TKD), dim=2)
    expected, written = torch.empty(2, 2, 5, 3, 64, dtype=dtype)
    write_kv(k_TKD, v_TKD, cos_TD, sin_TD, *expected)
    write_kv(packed[:, :, :64], packed[:, :, 64:], cos_TD, sin_TD, *written)
    assert torch.equal(written, expected)
    apart = torch.empty(2, 5, 3, 128, dtype=dtype)[..., ::2]  # features apart: left to PyTorch
    write_kv(k_TKD, v_TKD, cos_TD, sin_TD, *apart)
    assert torch.equal(apart[1], v_TKD)
    tolerance.rotary(k_TKD, cos_TD, sin_TD).check(apart[0])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_plane(dtype):
    x_TND, _, cos_TD, sin_TD = inputs(3, 2, 30, dtype)
    clean = rotate_(x_TND.clone(), cos_TD, sin_TD)
    x_TND[1, 1, 4] = float("nan")
    x_TND[2, 0, 17] = float("inf")
    result = rotate_(x_TND, cos_TD, sin_TD)
    touched = torch.zeros_like(result, dtype=torch.bool)
    touched[1, 1, [4, 19]] = touched[2, 0, [2, 17]] = True
    assert not result[touched].isfinite().any()
    assert torch.equal(result[~touched], clean[~touched])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("slots", [[0, 8], [-1, 3]])
def test_slots_outside_the_cache_are_refused_and_nothing_is_written(slots):
    k_TKD, v_TKD, cos_TD, sin_TD = inputs(2, 3, 64, torch.float32)
    caches = torch.zeros(2, 8, 3, 64)
    with pytest.raises(ValueError, match=f"slots {slots[0]} to {slots[1]}, outside 0 to 7"):
        write_kv(k_TKD, v_TKD, cos_TD, sin_TD, *caches, torch.tensor(slots))
    assert not caches.any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"k_TKD": a["k_TKD"][0]}, "k_TKD has shape"),
        (lambda a: a | {"k_TKD": a["k_TKD"][..., :63]}, "k_TKD has head dim 63"),
        (lambda a: a | {"v_TKD": a["v_TKD"][:, :2]}, "v_TKD has shape"),
        (lambda a: a | {"v_TKD": a["v_TKD"].bfloat16()}, "v_TKD has dtype"),
        (lambda a: a | {"cos_TD": a["cos_TD"][:1]}, "cos_TD has shape"),
        (lambda a: a | {"sin_TD": a["sin_TD"].double()}, "sin_TD has dtype"),
        (lambda a: a | {"k_cache_SKD": a["k_cache_SKD"][:, :2]}, "k_cache_SKD has shape"),
        (lambda a: a | {"v_cache_SKD": a["v_cache_SKD"][:4]}, "v_cache_SKD has shape"),
        (lambda a: a | {"v_cache_SKD": a["v_cache_SKD"].bfloat16()}, "v_cache_SKD has dtype"),
        (lambda a: a | {"slot_mapping_T": None}, "k_cache_SKD has shape"),
        (lambda a: a | {"slot_mapping_T": a["slot_mapping_T"][:1]}, "slot_mapping_T has shape"),
        (lambda a: a | {"slot_mapping_T": a["slot_mapping_T"].int()}, "slot_mapping_T is torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    names = ("k_TKD", "v_TKD", "cos_TD", "sin_TD")
    arguments = dict(zip(names, inputs(2, 3, 64, torch.float32), strict=True))
    arguments |= {"k_cache_SKD": torch.zeros(8, 3, 64), "v_cache_SKD": torch.zeros(8, 3, 64)}
    arguments |= {"slot_mapping_T": torch.tensor([4, 1])}
    with pytest.raises(ValueError, match=message):
        write_kv(**change(arguments))
