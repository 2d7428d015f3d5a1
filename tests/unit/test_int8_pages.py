"""int8 pages: what any stream and any step leaves in them, to the bit, and the memory that they take.

Shapes: L layers, B pages, P tokens of a page, K kv heads, T tokens, D head dim, Z the two of keys and values.
"""

from itertools import product

import pytest
import torch
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv_reference
from colm_kernels.rotary import rotate_
from torch import Tensor

from colm.kv import KvFormat, KvTile
from colm.wire.kv_codec import quantised, wire_token_bytes
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.settings import KvCacheDtype

NUM_LAYERS, NUM_KV_HEADS, PAGE_TOKENS, HEAD_DIM, NUM_PAGES, LAYER = 2, 3, 4, 8, 12, 1
TABLE_M = torch.tensor([8, 9, 10, 1, 2, 3], dtype=torch.int32).numpy()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACES = tuple(product((0, 3, 2 * PAGE_TOKENS), (1, PAGE_TOKENS, PAGE_TOKENS + 1, 13)))
"""First token and number of tokens of a tile."""


def format_of(dtype: torch.dtype) -> KvFormat:
    return KvFormat(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)


def store_of(dtype: torch.dtype, cache_dtype: KvCacheDtype) -> KvStore:
    """Pages full of known bytes, so that a stray write shows."""
    store = KvStore(KvLayout(format_of(dtype), PAGE_TOKENS, cache_dtype), NUM_PAGES)
    for tensor in tensors(store):
        tensor.view(torch.uint8).fill_(0x55)
    return store


def tensors(store: KvStore) -> list[Tensor]:
    """Of keys and of values: pages, and scales where there are some."""
    every = (store.k_pages_LBPKD, store.v_pages_LBPKD, store.k_scales_LBPK, store.v_scales_LBPK)
    return [tensor for tensor in every if tensor is not None]


def tile_of(first_token: int, num_tokens: int, dtype: torch.dtype) -> KvTile:
    generator = torch.Generator().manual_seed(num_tokens)
    both_ZKTD = torch.randn(2, NUM_KV_HEADS, num_tokens, HEAD_DIM, generator=generator).to(dtype)
    return KvTile(LAYER, first_token, *both_ZKTD)


def expected_pages(tile: KvTile, dtype: torch.dtype, *, is_int8_stream: bool, cache_dtype: KvCacheDtype) -> KvStore:
    """A store after a tile of a raw or int8 stream, by the definitions of kv_quantise.py, token by token."""
    store = store_of(dtype, cache_dtype)
    pages = (store.k_pages_LBPKD, store.k_scales_LBPK), (store.v_pages_LBPKD, store.v_scales_LBPK)
    for (pages_LBPKD, scales_LBPK), tokens_KTD in zip(pages, (tile.k_KTD, tile.v_KTD), strict=True):
        tokens_TKD = tokens_KTD.transpose(0, 1)
        q_TKD, scale_TK = quantise_kv_reference(tokens_TKD)
        for token in range(tile.num_tokens):
            column, slot = divmod(tile.first_token + token, PAGE_TOKENS)
            at = LAYER, int(TABLE_M[column]), slot
            if scales_LBPK is not None:
                pages_LBPKD[at], scales_LBPK[at] = q_TKD[token], scale_TK[token]
            elif is_int8_stream:
                pages_LBPKD[at] = dequantise_kv(q_TKD, scale_TK, dtype)[token]
            else:
                pages_LBPKD[at] = tokens_TKD[token]
    return store


def assert_same(store: KvStore, expected: KvStore) -> None:
    for ours, theirs in zip(tensors(store), tensors(expected), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
@pytest.mark.parametrize("is_int8_stream", [False, True], ids=["raw", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_stream_lands_in_every_page_as_it_is_defined_and_touches_nothing_else(
    dtype: torch.dtype, is_int8_stream: bool, cache_dtype: KvCacheDtype
) -> None:
    """int8 in int8 pages is what was sent; raw is quantised once, to the same bits."""
    for first_token, num_tokens in PLACES:
        tile = tile_of(first_token, num_tokens, dtype)
        store = store_of(dtype, cache_dtype)
        store.write(TABLE_M, quantised(tile) if is_int8_stream else tile)
        assert_same(store, expected_pages(tile, dtype, is_int8_stream=is_int8_stream, cache_dtype=cache_dtype))


def test_scales_at_an_odd_address_of_a_message_are_stored() -> None:
    """As in a message, whose payload begins anywhere."""
    tile = quantised(tile_of(3, 6, torch.bfloat16))
    assert tile.scale_ZKT is not None
    at_odd = torch.empty(tile.scale_ZKT.nbytes + 1, dtype=torch.uint8)
    at_odd[1:] = tile.scale_ZKT.flatten().view(torch.uint8)
    scale_ZKT = torch.frombuffer(at_odd.numpy(), dtype=torch.bfloat16, offset=1).view(tile.scale_ZKT.shape)
    ours, theirs = store_of(torch.bfloat16, "int8"), store_of(torch.bfloat16, "int8")
    ours.write(TABLE_M, KvTile(LAYER, 3, tile.k_KTD, tile.v_KTD, scale_ZKT))
    theirs.write(TABLE_M, tile)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_steps_tokens_are_quantised_and_written_again_over_refused_drafts(dtype: torch.dtype) -> None:
    store, expected = store_of(dtype, "int8"), store_of(dtype, "int8")
    slots_T = torch.tensor([5 * PAGE_TOKENS + 3, 0, 11 * PAGE_TOKENS + 2])
    cos_TD, sin_TD = (torch.rand(3, HEAD_DIM // 2).repeat(1, 2) for _ in range(2))
    refused_TKD, k_TKD, v_TKD = (torch.randn(3, NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(3))
    store.write_tokens(LAYER, slots_T, 100 * refused_TKD, 100 * refused_TKD, cos_TD, sin_TD)
    store.write_tokens(LAYER, slots_T, k_TKD.clone(), v_TKD, cos_TD, sin_TD)

    pages = (expected.k_pages_LBPKD, expected.k_scales_LBPK), (expected.v_pages_LBPKD, expected.v_scales_LBPK)
    for (pages_LBPKD, scales_LBPK), x_TKD in zip(pages, (rotate_(k_TKD, cos_TD, sin_TD), v_TKD), strict=True):
        assert scales_LBPK is not None
        at = LAYER, slots_T // PAGE_TOKENS, slots_T % PAGE_TOKENS
        pages_LBPKD[at], scales_LBPK[at] = quantise_kv_reference(x_TKD)
    assert_same(store, expected)


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_page_has_the_bytes_that_its_tensors_take_and_a_cache_as_many_as_fit(
    dtype: torch.dtype, cache_dtype: KvCacheDtype
) -> None:
    store = store_of(dtype, cache_dtype)
    layout, taken = store.layout, sum(tensor.nbytes for tensor in tensors(store))
    assert layout.page_bytes * NUM_PAGES == taken
    assert layout.pages_within(taken) == NUM_PAGES
    assert layout.pages_within(taken - 1) == NUM_PAGES - 1
    codec = "int8" if cache_dtype == "int8" else "raw"
    assert layout.layer_token_bytes == wire_token_bytes(layout.kv_format, codec)


def test_the_page_format_has_a_name_by_which_equal_pages_are_told() -> None:
    names = {cache_dtype: store_of(torch.bfloat16, cache_dtype).layout.page_format for cache_dtype in ("model", "int8")}
    assert names == {"model": "bfloat16", "int8": "int8"}
