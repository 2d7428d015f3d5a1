from colm.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PullKvRequest(_message.Message):
    __slots__ = ("open", "token_ids", "end_of_prompt", "acknowledged", "give_up", "shared_memory", "held_tile", "held_end", "checksum")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    END_OF_PROMPT_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    GIVE_UP_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    HELD_TILE_FIELD_NUMBER: _ClassVar[int]
    HELD_END_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    open: OpenKvTransfer
    token_ids: _common_pb2.TokenIds
    end_of_prompt: _common_pb2.EndOfPrompt
    acknowledged: KvPosition
    give_up: GiveUp
    shared_memory: SharedMemoryAnswer
    held_tile: HeldTile
    held_end: HeldEnd
    checksum: int
    def __init__(self, open: _Optional[_Union[OpenKvTransfer, _Mapping]] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., end_of_prompt: _Optional[_Union[_common_pb2.EndOfPrompt, _Mapping]] = ..., acknowledged: _Optional[_Union[KvPosition, _Mapping]] = ..., give_up: _Optional[_Union[GiveUp, _Mapping]] = ..., shared_memory: _Optional[_Union[SharedMemoryAnswer, _Mapping]] = ..., held_tile: _Optional[_Union[HeldTile, _Mapping]] = ..., held_end: _Optional[_Union[HeldEnd, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class KvPosition(_message.Message):
    __slots__ = ("layer", "token")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    layer: int
    token: int
    def __init__(self, layer: _Optional[int] = ..., token: _Optional[int] = ...) -> None: ...

class GiveUp(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HeldTile(_message.Message):
    __slots__ = ("tile", "payload")
    TILE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    tile: TileHeader
    payload: bytes
    def __init__(self, tile: _Optional[_Union[TileHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class HeldEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenKvTransfer(_message.Message):
    __slots__ = ("transfer_id", "epoch", "fingerprint", "num_tokens", "lease_id", "resume_from", "codecs", "attention", "host_id", "first_token", "cache_salt", "last_token_id", "held_tile_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_TILE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    fingerprint: str
    num_tokens: int
    lease_id: str
    resume_from: KvPosition
    codecs: _containers.RepeatedScalarFieldContainer[_common_pb2.Codec]
    attention: _common_pb2.AttentionMode
    host_id: str
    first_token: int
    cache_salt: bytes
    last_token_id: int
    held_tile_tokens: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., fingerprint: _Optional[str] = ..., num_tokens: _Optional[int] = ..., lease_id: _Optional[str] = ..., resume_from: _Optional[_Union[KvPosition, _Mapping]] = ..., codecs: _Optional[_Iterable[_Union[_common_pb2.Codec, str]]] = ..., attention: _Optional[_Union[_common_pb2.AttentionMode, str]] = ..., host_id: _Optional[str] = ..., first_token: _Optional[int] = ..., cache_salt: _Optional[bytes] = ..., last_token_id: _Optional[int] = ..., held_tile_tokens: _Optional[int] = ...) -> None: ...

class SharedMemoryAnswer(_message.Message):
    __slots__ = ("is_mapped", "takes_several")
    IS_MAPPED_FIELD_NUMBER: _ClassVar[int]
    TAKES_SEVERAL_FIELD_NUMBER: _ClassVar[int]
    is_mapped: bool
    takes_several: bool
    def __init__(self, is_mapped: _Optional[bool] = ..., takes_several: _Optional[bool] = ...) -> None: ...

class PullKvResponse(_message.Message):
    __slots__ = ("tile", "complete", "queued", "started", "reached", "shared_memory", "shared_tiles", "provisional_token", "prefix_wanted", "checksum", "payload")
    TILE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    SHARED_TILES_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WANTED_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    tile: TileHeader
    complete: TransferComplete
    queued: _common_pb2.Queued
    started: TransferStarted
    reached: KvPosition
    shared_memory: SharedMemory
    shared_tiles: SharedTiles
    provisional_token: _common_pb2.ProvisionalToken
    prefix_wanted: PrefixWanted
    checksum: int
    payload: bytes
    def __init__(self, tile: _Optional[_Union[TileHeader, _Mapping]] = ..., complete: _Optional[_Union[TransferComplete, _Mapping]] = ..., queued: _Optional[_Union[_common_pb2.Queued, _Mapping]] = ..., started: _Optional[_Union[TransferStarted, _Mapping]] = ..., reached: _Optional[_Union[KvPosition, _Mapping]] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., shared_tiles: _Optional[_Union[SharedTiles, _Mapping]] = ..., provisional_token: _Optional[_Union[_common_pb2.ProvisionalToken, _Mapping]] = ..., prefix_wanted: _Optional[_Union[PrefixWanted, _Mapping]] = ..., checksum: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PrefixWanted(_message.Message):
    __slots__ = ("first_token", "end_token", "refusal")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    end_token: int
    refusal: str
    def __init__(self, first_token: _Optional[int] = ..., end_token: _Optional[int] = ..., refusal: _Optional[str] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("pid", "fd", "size_bytes", "key")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    size_bytes: int
    key: bytes
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., size_bytes: _Optional[int] = ..., key: _Optional[bytes] = ...) -> None: ...

class SharedTiles(_message.Message):
    __slots__ = ("tiles",)
    TILES_FIELD_NUMBER: _ClassVar[int]
    tiles: _containers.RepeatedCompositeFieldContainer[TileHeader]
    def __init__(self, tiles: _Optional[_Iterable[_Union[TileHeader, _Mapping]]] = ...) -> None: ...

class SharedPayload(_message.Message):
    __slots__ = ("offset_bytes", "num_bytes")
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    offset_bytes: int
    num_bytes: int
    def __init__(self, offset_bytes: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class TransferStarted(_message.Message):
    __slots__ = ("codec", "tile_tokens")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TILE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    codec: _common_pb2.Codec
    tile_tokens: int
    def __init__(self, codec: _Optional[_Union[_common_pb2.Codec, str]] = ..., tile_tokens: _Optional[int] = ...) -> None: ...

class TileHeader(_message.Message):
    __slots__ = ("transfer_id", "epoch", "layer", "first_token", "num_tokens", "codec", "checksum", "shared", "header_checksum")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    HEADER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    layer: int
    first_token: int
    num_tokens: int
    codec: _common_pb2.Codec
    checksum: int
    shared: SharedPayload
    header_checksum: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., layer: _Optional[int] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., codec: _Optional[_Union[_common_pb2.Codec, str]] = ..., checksum: _Optional[int] = ..., shared: _Optional[_Union[SharedPayload, _Mapping]] = ..., header_checksum: _Optional[int] = ...) -> None: ...

class TransferComplete(_message.Message):
    __slots__ = ("transfer_id", "epoch", "num_tiles", "payload_bytes", "sparse", "shared_bytes", "num_computed_tokens", "num_cached_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    num_tiles: int
    payload_bytes: int
    sparse: _common_pb2.SparseReport
    shared_bytes: int
    num_computed_tokens: int
    num_cached_tokens: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., num_tiles: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., sparse: _Optional[_Union[_common_pb2.SparseReport, _Mapping]] = ..., shared_bytes: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...
