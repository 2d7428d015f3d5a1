"""Tiles are written into their pages, bit for bit, and change no other page.

Shapes: L layers, B pages, P tokens of a page, K kv heads, T tokens, D head dim, R requests.
"""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from colm_kernels.rotary import rotate_
from torch import Tensor

from colm.kv import KvFormat, KvTile
from colm.kv_position import KvPosition
from decode_node import kv_store
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.page_pool import PageBlock, PageLease
from tests.covering import pairs

NUM_LAYERS, NUM_KV_HEADS, PAGE_TOKENS, HEAD_DIM = 2, 3, 4, 8
NUM_PAGES = 12
LENGTHS = [1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 3 * PAGE_TOKENS, 13]
PLACES = {
    "contiguous": [3, 4, 5, 6, 7, 8],
    "backwards": [8, 7, 6, 5, 4, 3],
    "scattered": [9, 2, 11, 0, 7, 4],
    "two runs": [8, 9, 10, 1, 2, 3],
}
WIDTHS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(WIDTHS[tensor.dtype])


def random_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bit patterns, NaNs and infinities included."""
    info = torch.iinfo(WIDTHS[dtype])
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, dtype=WIDTHS[dtype], generator=generator).view(dtype)


def store_of(dtype: torch.dtype) -> KvStore:
    """A store with every page filled with known bits, so that a stray write shows."""
    kv_format = KvFormat(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)
    store = KvStore(KvLayout(kv_format, PAGE_TOKENS), NUM_PAGES)
    store.k_pages_LBPKD.copy_(random_bits(dtype, *store.k_pages_LBPKD.shape, seed=1))
    store.v_pages_LBPKD.copy_(random_bits(dtype, *store.v_pages_LBPKD.shape, seed=2))
    return store


@pytest.mark.parametrize(
    *pairs(
        {
            "first_token,num_tokens": product([0, 3, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS + 1], LENGTHS),
            "place": PLACES,
            "layer": range(NUM_LAYERS),
            "dtype": WIDTHS,
        }
    )
)
def test_a_tile_lands_bit_for_bit_and_touches_nothing_else(
    num_tokens: int, layer: int, first_token: int, place: str, dtype: torch.dtype
) -> None:
    store = store_of(dtype)
    table_M = torch.tensor(PLACES[place], dtype=torch.int32).numpy()
    k_KTD, v_KTD = (random_bits(dtype, NUM_KV_HEADS, num_tokens, HEAD_DIM, seed=seed) for seed in (3, 4))
    expected_k, expected_v = bits(store.k_pages_LBPKD).clone(), bits(store.v_pages_LBPKD).clone()
    for token in range(num_tokens):
        column, slot = divmod(first_token + token, PAGE_TOKENS)
        page = PLACES[place][column]
        expected_k[layer, page, slot] = bits(k_KTD[:, token])
        expected_v[layer, page, slot] = bits(v_KTD[:, token])

    store.write(table_M, KvTile(layer, first_token, k_KTD, v_KTD))

    assert torch.equal(bits(store.k_pages_LBPKD), expected_k)
    assert torch.equal(bits(store.v_pages_LBPKD), expected_v)
    read = store.read(table_M, layer, first_token, num_tokens)
    assert (read.layer, read.first_token) == (layer, first_token)
    assert torch.equal(bits(read.k_KTD), bits(k_KTD))
    assert torch.equal(bits(read.v_KTD), bits(v_KTD))


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("dtype", WIDTHS.keys(), ids=str)
def test_tokens_land_at_each_requests_page_and_slot_and_touch_nothing_else(dtype: torch.dtype, layer: int) -> None:
    store = store_of(dtype)
    pages_R, slots_R = torch.tensor([5, 0, 11]), torch.tensor([3, 0, 2])
    k_RKD, v_RKD = torch.randn(3, NUM_KV_HEADS, HEAD_DIM).to(dtype), random_bits(dtype, 3, NUM_KV_HEADS, HEAD_DIM)
    cos_RD, sin_RD = (torch.rand(3, HEAD_DIM // 2).repeat(1, 2) for _ in range(2))
    expected_k, expected_v = bits(store.k_pages_LBPKD).clone(), bits(store.v_pages_LBPKD).clone()
    expected_k[layer, pages_R, slots_R] = bits(rotate_(k_RKD.clone(), cos_RD, sin_RD))
    expected_v[layer, pages_R, slots_R] = bits(v_RKD)

    store.write_tokens(layer, pages_R * PAGE_TOKENS + slots_R, k_RKD, v_RKD, cos_RD, sin_RD)

    assert torch.equal(bits(store.k_pages_LBPKD), expected_k)
    assert torch.equal(bits(store.v_pages_LBPKD), expected_v)


def test_a_payload_that_changes_on_its_way_into_the_pages_is_stored_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library's one pass: the writer of shared memory may write to it at any time."""
    payload = bytearray(2 * NUM_KV_HEADS * HEAD_DIM * PAGE_TOKENS * 4)
    write = KvStore.write

    def change_and_write(store: KvStore, *args: Any) -> None:
        payload[:] = b"\1" * len(payload)
        write(store, *args)

    monkeypatch.setattr(KvStore, "write", change_and_write)
    monkeypatch.setattr(kv_store, "store_payload", lambda *_: None)
    store, table_M = store_of(torch.float32), np.array([3], dtype=np.int32)
    checksum = store.write_payload(table_M, KvPosition(1, 0), PAGE_TOKENS, memoryview(payload), "raw", is_shared=True)
    assert checksum == xxhash.xxh3_64_intdigest(bytes(len(payload)))
    assert store.k_pages_LBPKD[1, 3].eq(0).all()
    assert store.v_pages_LBPKD[1, 3].eq(0).all()


def test_a_page_table_lists_the_pages_of_every_run_in_order() -> None:
    table_M = store_of(torch.float32).page_table(
        PageLease("request", (PageBlock(((7, 3), (0, 1))), PageBlock(((4, 2),))))
    )
    assert table_M.dtype == np.int32
    assert table_M.tolist() == [7, 8, 9, 0, 4, 5]


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(1, 1), (PAGE_TOKENS, 1), (PAGE_TOKENS + 1, 2), (13, 4)])
def test_pages_are_counted_up_to_the_last_begun(num_tokens: int, num_pages: int) -> None:
    assert store_of(torch.float32).layout.pages(num_tokens) == num_pages


def test_a_page_holds_the_bytes_of_its_keys_and_values_in_all_layers() -> None:
    store = store_of(torch.bfloat16)
    assert store.layout.page_bytes == store.k_pages_LBPKD[:, 0].nbytes + store.v_pages_LBPKD[:, 0].nbytes
