"""Tiles as they wait to be sent: whole messages, the one copy that is made of the engine's output."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from colm.kv import KvFormat, KvTile
from colm.kv_position import KvPosition
from colm.request import KvCodec
from colm.wire.kv_codec import codec_of, quantised, wire_token_bytes
from colm.wire.shared_memory import SHARED_WINDOW_BYTES, SharedMemory, Slot
from colm.wire.tile_codec import decode_message, decode_tile, encode_tile, max_tile_tokens, seal, split_tile

MESSAGE_BYTES = 1 << 20
"""Of a message's payload, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileEncoder:
    """Makes the messages of one transfer."""

    transfer_id: str
    num_tokens: int
    """Of the prompt."""
    kv_format: KvFormat
    codec: KvCodec = "raw"
    first_token: int = 0
    """The reader has what lies before it, in every layer."""

    def encode(
        self, tile: KvTile, *, epoch: int, since: KvPosition, memory: SharedMemory | None = None
    ) -> "list[EncodedTile]":
        """Write a computed tile into messages of about 1 MiB; what lies before `since` is left out.

        Args:
            tile: as the engine made it.
            epoch: of the stream that reads it.
            since: what the reader has.
            memory: takes the payloads, as long as it has room.

        Raises:
            NotFinite: the tile cannot be sent.
        """
        max_tokens = max_tile_tokens(self.kv_format, MESSAGE_BYTES, self.codec)
        return [
            self._one(part, epoch, memory)
            for rest in self._since(tile, since)
            for part in split_tile(rest, max_tokens)
        ]  # fmt: skip

    def reissue(self, encoded: "EncodedTile", *, epoch: int, since: KvPosition, is_shared: bool) -> "EncodedTile":
        """The message again, as one of a newer epoch and without what lies before `since`; it must reach further.

        Args:
            encoded: as it was made.
            epoch: of the new stream.
            since: what its reader has.
            is_shared: the reader reads shared memory: a payload that it needs whole stays there.

        Raises:
            PeerUnavailable: it is not what was encoded any more.
        """
        header, payload = decode_message(encoded.message)
        payload = payload if encoded.slot is None else encoded.slot.payload
        tile = decode_tile(header.tile, payload, self.kv_format, self.codec)
        if is_shared and encoded.slot is not None and encoded.begin >= since:
            header.tile.epoch = epoch
            seal(header.tile)
            return replace(encoded, epoch=epoch, message=header.SerializeToString())
        (rest,) = self._since(tile, since)
        return self._one(rest, epoch, None)

    def share(self, tile_tokens: int) -> SharedMemory:
        """Memory for a window of this transfer's payloads, and for the tile that fills it.

        Raises:
            OSError: there is none to be had.
        """
        slot_tokens = min(max_tile_tokens(self.kv_format, MESSAGE_BYTES, self.codec), tile_tokens, self.num_tokens)
        slot_bytes = slot_tokens * wire_token_bytes(self.kv_format, self.codec)
        num_payloads = self.kv_format.num_layers * -(-self.num_tokens // slot_tokens)
        num_of_tile = -(-min(tile_tokens, self.num_tokens) // slot_tokens)
        return SharedMemory(slot_bytes, min(num_payloads, -(-SHARED_WINDOW_BYTES // slot_bytes) + num_of_tile))

    def _since(self, tile: KvTile, since: KvPosition) -> Iterator[KvTile]:
        first_token = since.at_least(self.first_token).token if tile.layer == since.layer else self.first_token
        num_gone = min(tile.num_tokens, first_token - tile.first_token)
        if tile.layer < since.layer or num_gone == tile.num_tokens:
            return
        if num_gone <= 0:
            yield tile
        else:
            yield tile.part(num_gone, tile.num_tokens)

    def _one(self, tile: KvTile, epoch: int, memory: SharedMemory | None) -> "EncodedTile":
        begin = KvPosition(tile.layer, tile.first_token)
        if codec_of(tile) != self.codec:
            tile = quantised(tile)
        payload_bytes = tile.num_tokens * wire_token_bytes(self.kv_format, self.codec)
        slot = None if memory is None else memory.take(payload_bytes)
        return EncodedTile(
            begin=begin,
            end=begin.after(tile.num_tokens, self.num_tokens),
            epoch=epoch,
            payload_bytes=payload_bytes,
            message=encode_tile(tile, transfer_id=self.transfer_id, epoch=epoch, slot=slot),
            slot=slot,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTile:
    """A message of the stream, and what it brings."""

    begin: KvPosition
    end: KvPosition
    epoch: int
    payload_bytes: int
    message: bytes
    slot: Slot | None = None
    """Shared memory that holds the payload; None if the message does."""

    @property
    def held_bytes(self) -> int:
        """Memory that it takes."""
        return len(self.message) + (0 if self.slot is None else self.payload_bytes)

    def let_go(self) -> None:
        """Give its shared memory back; nobody needs the payload any more."""
        if self.slot is not None:
            self.slot.release()
