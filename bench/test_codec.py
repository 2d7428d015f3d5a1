"""A KV tile's way into messages and out of them into pages, for pytest-benchmark: `make bench`."""

import numpy as np
import pytest
import torch
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv_reference
from pytest_benchmark.fixture import BenchmarkFixture

from colm.defaults import PAGE_TOKENS, TILE_TOKENS
from colm.kv import KvFormat, KvTile
from colm.wire.kv_codec import quantised
from colm.wire.tile_codec import decode_message, decode_tile, encode_tile
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore

ROUNDS = 50
FORMAT = KvFormat(num_layers=2, num_kv_heads=8, head_dim=64, dtype=torch.bfloat16)


@pytest.fixture
def tile() -> KvTile:
    """A tile of LLaMA-1B's shape: the second of a longer prompt, so that its heads do not lie side by side."""
    k_KNE, v_KNE = torch.randn(2, FORMAT.num_kv_heads, 4 * TILE_TOKENS, FORMAT.head_dim).to(FORMAT.dtype)
    return KvTile(1, TILE_TOKENS, *(each[:, TILE_TOKENS : 2 * TILE_TOKENS] for each in (k_KNE, v_KNE)))


def test_encode(benchmark: BenchmarkFixture, tile: KvTile) -> None:
    """From the engine's tensors to a message with its checksum."""
    benchmark.extra_info["tile_bytes"] = FORMAT.token_bytes // FORMAT.num_layers * TILE_TOKENS
    benchmark.pedantic(lambda: encode_tile(tile, transfer_id="t", epoch=1), rounds=ROUNDS, warmup_rounds=3)


def test_encode_in_int8(benchmark: BenchmarkFixture, tile: KvTile) -> None:
    """The same with keys and values quantised on the way."""
    benchmark.pedantic(lambda: encode_tile(quantised(tile), transfer_id="t", epoch=1), rounds=ROUNDS, warmup_rounds=3)


def test_decode_into_pages(benchmark: BenchmarkFixture, tile: KvTile) -> None:
    """From a message, verified, into its pages."""
    layout = KvLayout(FORMAT, PAGE_TOKENS)
    store = KvStore(layout, layout.pages(4 * TILE_TOKENS))
    table_M = np.arange(store.num_pages, dtype=np.int32)
    message = bytes(encode_tile(tile, transfer_id="t", epoch=1))

    def receive() -> None:
        header, payload = decode_message(message)
        store.write(table_M, decode_tile(header.tile, payload, FORMAT))

    receive()
    placed = store.k_pages_LBPKD[1].flatten(0, 1)[TILE_TOKENS : 2 * TILE_TOKENS]
    assert torch.equal(placed, tile.k_KTD.transpose(0, 1)), "the tile is not in its pages"
    benchmark.pedantic(receive, rounds=ROUNDS, warmup_rounds=3)


def test_decode_from_int8_into_pages(benchmark: BenchmarkFixture, tile: KvTile) -> None:
    """From a message, verified and widened, into its pages."""
    layout = KvLayout(FORMAT, PAGE_TOKENS)
    store = KvStore(layout, layout.pages(4 * TILE_TOKENS))
    table_M = np.arange(store.num_pages, dtype=np.int32)
    message = encode_tile(quantised(tile), transfer_id="t", epoch=1)

    def receive() -> None:
        header, payload = decode_message(message)
        store.write(table_M, decode_tile(header.tile, payload, FORMAT, "int8"))

    receive()
    placed = store.k_pages_LBPKD[1].flatten(0, 1)[TILE_TOKENS : 2 * TILE_TOKENS]
    expected = dequantise_kv(*quantise_kv_reference(tile.k_KTD.transpose(0, 1)), FORMAT.dtype)
    assert torch.equal(placed, expected), "the tile is not in its pages"
    benchmark.pedantic(receive, rounds=ROUNDS, warmup_rounds=3)
