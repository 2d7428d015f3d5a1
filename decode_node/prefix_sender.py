"""Sends a prompt's beginning up to a prefill node that has forgotten it: out of its pages, as they were brought."""

import logging
from collections.abc import Iterator
from typing import Self

from colm.errors import PeerUnavailable
from colm.kv import KvTile
from colm.wire.tile_codec import max_tile_tokens
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_store import KvStore

logger = logging.getLogger(__name__)

_MESSAGE_BYTES = 1 << 20


class PrefixSender:
    """What one stream sends of what lies before its transfer's first token; its caller lets one thread in at a time.

    Args:
        transfer: of the stream.
        store: has the pages, in the model's dtype; nobody writes to these while the stream lasts.
    """

    def __init__(self, transfer: KvTransfer, store: KvStore) -> None:
        self._transfer = transfer
        self._store = store
        self._end_token = 0
        self._pieces: Iterator[tuple[int, int, int]] | None = None
        self._next: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, transfer: KvTransfer, store: KvStore) -> Self | None:
        """None where the pages do not hold, bit by bit, what a prefill node has computed: int8 is not it."""
        return cls(transfer, store) if transfer.held_tile_tokens and store.layout.cache_dtype == "model" else None

    def want(self, first_token: int, end_token: int, refusal: str = "") -> None:
        """Send from a token up to another one, or nothing more, where the node says why.

        Raises:
            PeerUnavailable: that was not offered.
        """
        ledger, tile_tokens = self._transfer.ledger, self._transfer.held_tile_tokens
        if refusal:
            logger.warning("prefix.refused request=%s cause=%s", ledger.transfer_id, refusal)
            return self.stop()
        is_offered = first_token < end_token <= ledger.first_token and self._end_token <= end_token
        if not is_offered or first_token % tile_tokens or end_token % tile_tokens:
            raise PeerUnavailable(
                f"the KV stream broke its format: tokens {first_token} to {end_token} are asked for, of "
                f"{ledger.first_token} in tiles of {tile_tokens}"
            )
        if self._pieces is None:
            self._pieces = self._places(first_token)
            self._next = next(self._pieces)
        self._end_token = end_token

    def stop(self) -> None:
        """Send nothing more, whatever is wanted."""
        self._pieces, self._next = iter(()), None

    @property
    def is_due(self) -> bool:
        """There is something to send that was asked for."""
        return self._next is not None and self._next[1] < self._end_token

    def take(self) -> KvTile:
        """The next piece; only while `is_due`."""
        assert self._next is not None
        assert self._pieces is not None
        layer, first_token, num_tokens = self._next
        self._next = next(self._pieces, None)
        return self._store.read(self._transfer.table_M, layer, first_token, num_tokens)

    def _places(self, first_token: int) -> Iterator[tuple[int, int, int]]:
        """(layer, first token, tokens) of each piece, in the order of sending."""
        kv_format, tile_tokens = self._store.layout.kv_format, self._transfer.held_tile_tokens
        max_tokens = max_tile_tokens(kv_format, _MESSAGE_BYTES)
        for start in range(first_token, self._transfer.ledger.first_token, tile_tokens):
            for layer in range(kv_format.num_layers):
                for piece in range(start, start + tile_tokens, max_tokens):
                    yield layer, piece, min(max_tokens, start + tile_tokens - piece)
