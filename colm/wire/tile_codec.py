"""Tiles to messages of the KV stream and back, without protobuf's copies.

A `PullKvResponse` ends with its payload. Writing the small header through protobuf and the payload behind it, and
taking the payload out as a view, keeps the bytes on the wire exactly those of the .proto file and moves them
twice as fast as the generated classes do (docs/adr/0003).
"""

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import grpc
import torch
import xxhash
from google.protobuf.message import DecodeError
from torch import Tensor

from colm.errors import FingerprintMismatch, PeerUnavailable
from colm.kv import KvFormat, KvTile
from colm.request import KvCodec
from colm.wire.kv_codec import codec_of, not_finite, read_payload, require_codec, wire_token_bytes
from colm.wire.messages import CODECS
from colm.wire.payload import write_payload
from colm.wire.seal import is_sealed
from colm.wire.seal import seal as seal_message
from colm.wire.shared_memory import Slot
from colm.wire.v1 import kv_transfer_service_pb2 as pb

if sys.byteorder != "little":
    raise ImportError("the KV stream is little-endian and this machine is not")

SERVICE = "colm.wire.v1.KvTransferService"
METHOD = "PullKv"
WINDOW_BYTES = 64 << 20
"""What a sender holds of tiles that are not acknowledged; with so much it computes no further. Enough to keep the wire
busy, little enough to notice a slow reader."""
ACKNOWLEDGE_BYTES = 4 << 20
"""A receiver acknowledges at least as often: well before the window is full."""
# Bytes that are not written yet, as CPython itself makes them.
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_ssize_t)
_PAYLOAD_TAG = 15 << 3 | 2
_SHARED_TILES_TAG = pb.PullKvResponse.SHARED_TILES_FIELD_NUMBER << 3 | 2
_CHECKSUM_FIELD = pb.PullKvResponse.CHECKSUM_FIELD_NUMBER
_CHECKSUM_TAG = _CHECKSUM_FIELD << 3 | 1
_EVENT_TAGS = {field.number << 3 | 2 for field in pb.PullKvResponse.DESCRIPTOR.oneofs_by_name["event"].fields}

# PyTorch warns once a process about a tensor over read-only memory, such as a received message. The warning is
# provoked and silenced here; views into messages are only read.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def encode_tile(tile: KvTile, *, transfer_id: str, epoch: int, slot: Slot | None = None) -> bytes:
    """One message of the stream, and in CPU memory the only copy of a tile. `decode_tile` undoes it.

    Args:
        tile: to send.
        transfer_id: of the stream.
        epoch: of the stream.
        slot: shared memory, where the payload then goes; the message says where it lies.

    Raises:
        NotFinite: a raw tile holds NaN or infinities; names its layer and tokens.
    """
    codec, tensors = codec_of(tile), _on_host(*tile.tensors)
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    header = pb.PullKvResponse(
        tile=pb.TileHeader(
            transfer_id=transfer_id,
            epoch=epoch,
            layer=tile.layer,
            first_token=tile.first_token,
            num_tokens=tile.num_tokens,
            codec=CODECS[codec],
            checksum=1,  # in its place: every checksum but 0 takes as many bytes
            shared=None if slot is None else pb.SharedPayload(offset_bytes=slot.offset_bytes, num_bytes=num_bytes),
        )
    )
    seal(header.tile)  # in its place, too
    between = b"" if slot is not None else _varint(_PAYLOAD_TAG) + _varint(num_bytes)
    start = header.ByteSize() + len(between)
    # Nobody else has seen the message yet, so its bytes may be written.
    message: bytes = _new_bytes(None, start + num_bytes if slot is None else start)
    written = torch.frombuffer(message, dtype=torch.uint8)
    payload = written[start:] if slot is None else torch.frombuffer(slot.reserve(num_bytes), dtype=torch.uint8)
    header.tile.checksum, is_finite = write_payload(tensors, payload)
    if not is_finite:
        raise not_finite(tile, "NaN or infinities")
    seal(header.tile)
    front = header.SerializeToString() + between
    if len(front) != start:
        return front + message[start:]
    written[:start] = torch.frombuffer(front, dtype=torch.uint8)
    return message


def join_shared(messages: Sequence[bytes]) -> bytes:
    """One message for several tiles of shared memory; a header has the same bytes in it as in a message of its own."""
    tiles = b"".join(messages)
    return _varint(_SHARED_TILES_TAG) + _varint(len(tiles)) + tiles


def encode_event(event: pb.PullKvResponse) -> bytes:
    """A message of the stream that is no tile, with its checksum. `decode_message` undoes it."""
    return seal_message(event.SerializeToString(), field=_CHECKSUM_FIELD)


def seal(header: pb.TileHeader) -> None:
    """Give a header its checksum, once all else in it is as it shall be sent."""
    header.header_checksum = _header_checksum(header)


def split_tile(tile: KvTile, max_tokens: int) -> Iterator[KvTile]:
    """Cut a tile into runs of at most `max_tokens` tokens."""
    for start in range(0, tile.num_tokens, max_tokens):
        yield tile.part(start, min(start + max_tokens, tile.num_tokens))


def decode_message(data: bytes) -> tuple[pb.PullKvResponse, memoryview]:
    """Header and payload; the payload is a view into `data`.

    Raises:
        PeerUnavailable: bytes that are not a message of the stream.
    """
    view = memoryview(data)
    try:
        tag, start = _read_varint(view, 0)
        if tag not in _EVENT_TAGS:
            raise ValueError(f"unexpected field tag {tag}")
        length, start = _read_varint(view, start)
        end = start + length
        header = pb.PullKvResponse.FromString(data[:end])
        if end == len(data):
            return header, view[end:]
        if view[end] == _CHECKSUM_TAG:
            if not is_sealed(data, field=_CHECKSUM_FIELD):
                raise ValueError("it was damaged on the way (checksum)")
            return header, view[len(data) :]
        tag, start = _read_varint(view, end)
        length, start = _read_varint(view, start)
        if tag != _PAYLOAD_TAG or start + length != len(data):
            raise ValueError(f"payload of {length} bytes announced, {len(data) - start} present")
    except (ValueError, IndexError, DecodeError) as err:
        raise PeerUnavailable(f"the KV stream broke its format: {err}") from err
    return header, view[start:]


def decode_tile(header: pb.TileHeader, payload: memoryview, kv_format: KvFormat, codec: KvCodec = "raw") -> KvTile:
    """The tile of a message that `decode_message` has taken apart, as views into it.

    Args:
        header: of the tile.
        payload: behind it.
        kv_format: of both ends.
        codec: that was agreed on.

    Raises:
        PeerUnavailable: header or payload was damaged on the way.
        FingerprintMismatch: it came whole, in another codec or format; a retry cannot help.
    """
    require_tile(header, payload, kv_format, codec)
    require_intact(header, xxhash.xxh3_64_intdigest(payload))
    return read_payload(
        payload,
        codec,
        kv_format,
        layer=header.layer,
        first_token=header.first_token,
        num_tokens=header.num_tokens,
    )


def require_tile(header: pb.TileHeader, payload: memoryview, kv_format: KvFormat, codec: KvCodec) -> None:
    """Refuse a tile by its header, the payload still unread: that is for `require_intact`.

    Args:
        header: of the tile.
        payload: behind it, or in shared memory.
        kv_format: of both ends.
        codec: that was agreed on.

    Raises:
        PeerUnavailable: the tile was damaged on the way.
        FingerprintMismatch: it came whole, in another codec or format; a retry cannot help.
    """
    if header.HasField("header_checksum") and header.header_checksum != _header_checksum(header):
        raise PeerUnavailable("a tile's header was damaged on the way (checksum)")
    num_bytes = header.num_tokens * wire_token_bytes(kv_format, codec)
    if header.num_tokens and header.codec == CODECS[codec] and len(payload) == num_bytes:
        return
    # What arrived damaged says nothing of the format.
    require_intact(header, xxhash.xxh3_64_intdigest(payload))
    place = _place(header)
    if not header.num_tokens:
        raise PeerUnavailable(f"{place} is empty")
    require_codec(header.codec, codec, place)
    raise FingerprintMismatch(
        f"{place} came as {len(payload)} bytes for {header.num_tokens} tokens; "
        f"in this node's format they are {num_bytes}"
    )


def require_intact(header: pb.TileHeader, checksum: int) -> None:
    """Refuse a tile whose payload has another checksum than its header says.

    Raises:
        PeerUnavailable: it has.
    """
    if checksum != header.checksum:
        raise PeerUnavailable(f"{_place(header)} was damaged on the way (checksum)")


def max_tile_tokens(kv_format: KvFormat, message_bytes: int, codec: KvCodec = "raw") -> int:
    """The longest run of tokens of one layer whose keys and values fit a message; at least one token."""
    return max(1, message_bytes // wire_token_bytes(kv_format, codec))


def pull_kv_handlers(behaviour: Callable[..., object]) -> grpc.GenericRpcHandler:
    """Register a coroutine that writes encoded messages as `KvTransferService.PullKv`."""
    handler = grpc.stream_stream_rpc_method_handler(behaviour, pb.PullKvRequest.FromString, None)
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})


def pull_kv_stub(channel: grpc.Channel) -> grpc.StreamStreamMultiCallable:
    """Call `KvTransferService.PullKv`; yields undecoded messages."""
    return channel.stream_stream(f"/{SERVICE}/{METHOD}", pb.PullKvRequest.SerializeToString, None)


def _place(header: pb.TileHeader) -> str:
    return f"the tile at layer {header.layer} token {header.first_token}"


def _header_checksum(header: pb.TileHeader) -> int:
    rest = pb.TileHeader()
    rest.CopyFrom(header)
    rest.ClearField("header_checksum")
    return xxhash.xxh3_64_intdigest(rest.SerializeToString(deterministic=True))


def _on_host(*tensors: Tensor) -> list[Tensor]:
    """All where the host reads them: as they are on the CPU, else copied into pinned memory, side by side."""
    on_host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return on_host


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")
