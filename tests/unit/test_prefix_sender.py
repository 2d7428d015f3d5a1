"""What a decode node sends up of a prompt's beginning: which pieces, in which order, and no more than is asked for."""

import numpy as np
import pytest
import torch

from colm.errors import PeerUnavailable
from colm.kv import KvFormat, KvTile
from colm.wire.tile_codec import decode_tile
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node import prefix_sender
from decode_node.kv_fetch import KvOrder, KvTransfer
from decode_node.kv_layout import KvLayout
from decode_node.kv_requests import KvRequests
from decode_node.kv_store import KvStore
from decode_node.page_pool import PagePool
from decode_node.prefix_sender import PrefixSender
from decode_node.settings import KvCacheDtype
from decode_node.transfer_ledger import TransferLedger

FORMAT = KvFormat(num_layers=2, num_kv_heads=3, head_dim=8, dtype=torch.bfloat16)
PAGE_TOKENS, TILE_TOKENS, NUM_HELD, NUM_TOKENS = 4, 8, 24, 30
PAGES = np.array([7, 2, 3, 9, 0, 5, 6, 1], dtype=np.int32)


def store_of(cache_dtype: KvCacheDtype = "model") -> KvStore:
    store = KvStore(KvLayout(FORMAT, PAGE_TOKENS, cache_dtype), 10)
    if cache_dtype == "model":
        generator = torch.Generator().manual_seed(1)
        for layer in range(FORMAT.num_layers):
            store.write(PAGES, KvTile(layer, 0, *(torch.randn((2, 3, NUM_HELD, 8), generator=generator).bfloat16())))
    return store


def transfer(held_tile_tokens: int = TILE_TOKENS) -> KvTransfer:
    ledger = TransferLedger(transfer_id="t", num_layers=2, num_tokens=NUM_TOKENS, first_token=NUM_HELD)
    ledger.begin()
    return KvTransfer(
        ledger=ledger,
        fingerprint="f",
        token_ids=np.arange(NUM_TOKENS),
        table_M=PAGES,
        held_tile_tokens=held_tile_tokens,
    )


class Said:
    """The requests of a stream whose prompt has been read, and the pages behind them."""

    def __init__(self) -> None:
        self.store = store_of()
        asked = transfer()
        self.requests = KvRequests(asked, "l", lambda: None, held=PrefixSender.of(asked, self.store))
        self.words = iter(self.requests)
        opened, _, _ = (next(self.words) for _ in range(3))
        self.opened = opened.open

    def want(self, first_token: int, end_token: int, refusal: str = "") -> None:
        self.requests.want(pb.PrefixWanted(first_token=first_token, end_token=end_token, refusal=refusal))

    def pieces(self, num_pieces: int) -> list[tuple[int, int, int]]:
        """(layer, first token, tokens) of the next ones, whose bits are those of the pages."""
        places = []
        for _ in range(num_pieces):
            held = next(self.words).held_tile
            tile = decode_tile(held.tile, memoryview(held.payload), FORMAT)
            right = self.store.read(PAGES, tile.layer, tile.first_token, tile.num_tokens)
            assert torch.equal(tile.k_KTD.view(torch.int16), right.k_KTD.view(torch.int16))
            assert torch.equal(tile.v_KTD.view(torch.int16), right.v_KTD.view(torch.int16))
            assert (held.tile.transfer_id, held.tile.epoch) == ("t", 1)
            places.append((tile.layer, tile.first_token, tile.num_tokens))
        return places

    def rest(self) -> list[str | None]:
        self.requests.close()
        return [word.WhichOneof("part") for word in self.words]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.setattr(prefix_sender, "_MESSAGE_BYTES", 5 * FORMAT.layer_token_bytes)
    return Said()


def test_tiles_go_up_one_after_another_in_all_layers_as_far_as_is_wanted(said: Said) -> None:
    assert said.opened.held_tile_tokens == TILE_TOKENS
    said.want(8, 16)
    assert said.pieces(4) == [(0, 8, 5), (0, 13, 3), (1, 8, 5), (1, 13, 3)]
    said.want(8, 24)
    assert said.pieces(1) == [(0, 16, 5)]
    assert said.rest() == [], "the pages may be another's once the stream is closed"


def test_a_refusal_ends_it(said: Said) -> None:
    said.want(0, 24)
    said.pieces(1)
    said.want(0, 24, "the tile at layer 0 token 0 was damaged")
    assert said.rest() == []


def test_pages_that_hold_no_numbers_any_more_end_it(said: Said) -> None:
    said.want(0, 24)
    said.pieces(1)
    said.store.k_pages_LBPKD[:] = torch.nan
    assert next(said.words).WhichOneof("part") == "held_end"
    said.want(0, 24)
    assert said.rest() == []


@pytest.mark.parametrize(("first_token", "end_token"), [(0, 32), (0, 0), (16, 8), (4, 8), (0, 12)])
def test_what_was_not_offered_breaks_the_stream(said: Said, first_token: int, end_token: int) -> None:
    with pytest.raises(PeerUnavailable, match=f"tokens {first_token} to {end_token}"):
        said.want(first_token, end_token)


def test_less_than_before_breaks_the_stream(said: Said) -> None:
    said.want(0, 16)
    with pytest.raises(PeerUnavailable, match="tokens 0 to 8"):
        said.want(0, 8)


def test_a_stream_that_offers_nothing_is_asked_for_nothing() -> None:
    asked = transfer()
    requests = KvRequests(asked, "l", lambda: None)
    assert next(iter(requests)).open.held_tile_tokens == 0
    with pytest.raises(PeerUnavailable, match="nobody offered"):
        requests.want(pb.PrefixWanted(end_token=TILE_TOKENS))


def test_only_pages_that_hold_the_bits_of_an_engine_are_offered() -> None:
    assert PrefixSender.of(transfer(), store_of()) is not None
    assert PrefixSender.of(transfer(0), store_of()) is None
    assert PrefixSender.of(transfer(), store_of("int8")) is None


@pytest.mark.parametrize(
    ("change", "held_tile_tokens"),
    [
        ({}, TILE_TOKENS),
        ({"codec": "int8"}, 0),
        ({"attention": "sparse"}, 0),
        ({"first_token": 0}, 0),
        ({"is_prefix_exact": False}, 0),
    ],
)
def test_an_order_offers_what_came_bit_by_bit(change: dict[str, object], held_tile_tokens: int) -> None:
    pages = PagePool(10).reserve("r", 8)
    assert pages is not None
    order = {"request_id": "r", "token_ids": np.arange(NUM_TOKENS), "pages": pages, "table_M": PAGES}
    fields = order | {"first_token": NUM_HELD, "tile_tokens": TILE_TOKENS} | change
    assert KvOrder(**fields).held_tile_tokens == held_tile_tokens  # type: ignore[arg-type]
