"""Only the tile that must come next is written into the pages, and only what is whole counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from colm.clock import MonotonicClock
from colm.errors import PeerUnavailable
from colm.kv import KvFormat, KvTile
from colm.kv_position import KV_START, KvPosition
from colm.wire.channels import BlockingChannels
from colm.wire.security import Security
from colm.wire.tile_codec import decode_message, encode_tile
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_layout import KvLayout
from decode_node.kv_receiver import KvReceiver
from decode_node.kv_store import KvStore
from decode_node.prefill_pool import PrefillLease
from decode_node.transfer_ledger import TransferLedger

FORMAT = KvFormat(num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
NUM_TOKENS = 8


def receiver() -> tuple[KvReceiver, KvStore, TransferLedger]:
    """In its first epoch, with pages of ones."""
    store = KvStore(KvLayout(FORMAT, 4), 2)
    store.k_pages_LBPKD.fill_(1)
    store.v_pages_LBPKD.fill_(1)
    ledger = TransferLedger(transfer_id="t", num_layers=2, num_tokens=NUM_TOKENS)
    ledger.begin()
    transfer = KvTransfer(
        ledger=ledger,
        fingerprint="",
        token_ids=np.zeros(NUM_TOKENS, dtype=np.int64),
        table_M=np.arange(2, dtype=np.int32),
    )
    channels = BlockingChannels(Security())
    lease = PrefillLease(address="", lease_id="")
    return KvReceiver(transfer, lease, store, channels, Security(), MonotonicClock()), store, ledger


def tile_of(layer: int, first_token: int, num_tokens: int) -> KvTile:
    k_KTD, v_KTD = (torch.full((2, num_tokens, 64), value, dtype=torch.bfloat16) for value in (2.0, 3.0))
    return KvTile(layer, first_token, k_KTD, v_KTD)


TILE = tile_of(0, 0, NUM_TOKENS)


@pytest.mark.parametrize(
    ("tile", "epoch"), [(TILE, 2), (replace(TILE, layer=1), 1), (tile_of(0, 1, 7), 1), (tile_of(0, 0, 9), 1)]
)
def test_a_tile_that_must_not_come_next_touches_no_page(tile: KvTile, epoch: int) -> None:
    receiving, store, ledger = receiver()
    header, payload = decode_message(encode_tile(tile, transfer_id="t", epoch=epoch))
    with pytest.raises(PeerUnavailable, match="broke the KV stream's order"):
        receiving._store_tile(header.tile, payload)
    assert store.k_pages_LBPKD.eq(1).all()
    assert store.v_pages_LBPKD.eq(1).all()
    assert ledger.position == KV_START


def test_a_damaged_payload_does_not_count_and_is_written_over() -> None:
    receiving, store, ledger = receiver()
    data = encode_tile(TILE, transfer_id="t", epoch=1)
    header, payload = decode_message(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PeerUnavailable, match="damaged on the way"):
        receiving._store_tile(header.tile, payload)
    assert ledger.position == KV_START
    header, payload = decode_message(data)
    receiving._store_tile(header.tile, payload)
    assert ledger.position == KvPosition(1, 0)
    assert store.k_pages_LBPKD[0].eq(2).all()
    assert store.v_pages_LBPKD[0].eq(3).all()
