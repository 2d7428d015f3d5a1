"""Tiles as they wait to be sent: whole messages, the one copy that is made of the engine's output."""

from collections.abc import Iterator
from dataclasses import dataclass

from colm.kv import KvFormat, KvTile
from colm.kv_position import KvPosition
from colm.request import KvCodec
from colm.wire.kv_codec import codec_of, quantised, wire_token_bytes
from colm.wire.tile_codec import decode_message, decode_tile, encode_tile, max_tile_tokens, split_tile

_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TileEncoder:
    """Makes the messages of one transfer."""

    transfer_id: str
    num_tokens: int
    """Of the prompt."""
    kv_format: KvFormat
    codec: KvCodec = "raw"

    def encode(self, tile: KvTile, *, epoch: int, since: KvPosition) -> "list[EncodedTile]":
        """Write a computed tile into messages of about 1 MiB; what lies before `since` is left out.

        Raises:
            NotFinite: the tile cannot be sent.
        """
        max_tokens = max_tile_tokens(self.kv_format, _MESSAGE_BYTES, self.codec)
        return [
            self._one(part, epoch)
            for rest in self._since(tile, since)
            for part in split_tile(rest, max_tokens)
        ]  # fmt: skip

    def reissue(self, encoded: "EncodedTile", *, epoch: int, since: KvPosition) -> "EncodedTile":
        """The message again, as one of a newer epoch and without what lies before `since`; it must reach further."""
        header, payload = decode_message(encoded.message)
        (rest,) = self._since(decode_tile(header.tile, payload, self.kv_format, self.codec), since)
        return self._one(rest, epoch)

    def _since(self, tile: KvTile, since: KvPosition) -> Iterator[KvTile]:
        num_gone = min(tile.num_tokens, since.token - tile.first_token) if tile.layer == since.layer else 0
        if tile.layer < since.layer or num_gone == tile.num_tokens:
            return
        if num_gone <= 0:
            yield tile
        else:
            yield tile.part(num_gone, tile.num_tokens)

    def _one(self, tile: KvTile, epoch: int) -> "EncodedTile":
        begin = KvPosition(tile.layer, tile.first_token)
        if codec_of(tile) != self.codec:
            tile = quantised(tile)
        return EncodedTile(
            begin=begin,
            end=begin.after(tile.num_tokens, self.num_tokens),
            epoch=epoch,
            payload_bytes=tile.num_tokens * wire_token_bytes(self.kv_format, self.codec),
            message=encode_tile(tile, transfer_id=self.transfer_id, epoch=epoch),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTile:
    """A message of the stream, and what it brings."""

    begin: KvPosition
    end: KvPosition
    epoch: int
    payload_bytes: int
    message: bytes
