from colm.wire.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("open", "token_ids", "end_of_prompt", "resume", "change_scale", "checksum")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    END_OF_PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CHANGE_SCALE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    open: OpenDecode
    token_ids: _common_pb2.TokenIds
    end_of_prompt: _common_pb2.EndOfPrompt
    resume: ResumeDecode
    change_scale: _common_pb2.Scale
    checksum: int
    def __init__(self, open: _Optional[_Union[OpenDecode, _Mapping]] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., end_of_prompt: _Optional[_Union[_common_pb2.EndOfPrompt, _Mapping]] = ..., resume: _Optional[_Union[ResumeDecode, _Mapping]] = ..., change_scale: _Optional[_Union[_common_pb2.Scale, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class OpenDecode(_message.Message):
    __slots__ = ("request_id", "num_chains", "max_new_tokens", "sampling", "num_prompt_tokens", "lease_id", "only_if_room", "num_answer_tokens", "answer_key", "attention", "kv_codec", "cache_salt", "max_draft_tokens", "provisional_first_token", "min_chains")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_CHAINS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ONLY_IF_ROOM_FIELD_NUMBER: _ClassVar[int]
    NUM_ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_KEY_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    KV_CODEC_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MIN_CHAINS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    num_chains: int
    max_new_tokens: int
    sampling: _common_pb2.Sampling
    num_prompt_tokens: int
    lease_id: str
    only_if_room: bool
    num_answer_tokens: int
    answer_key: str
    attention: _common_pb2.AttentionMode
    kv_codec: _common_pb2.Codec
    cache_salt: bytes
    max_draft_tokens: int
    provisional_first_token: bool
    min_chains: int
    def __init__(self, request_id: _Optional[str] = ..., num_chains: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., num_prompt_tokens: _Optional[int] = ..., lease_id: _Optional[str] = ..., only_if_room: _Optional[bool] = ..., num_answer_tokens: _Optional[int] = ..., answer_key: _Optional[str] = ..., attention: _Optional[_Union[_common_pb2.AttentionMode, str]] = ..., kv_codec: _Optional[_Union[_common_pb2.Codec, str]] = ..., cache_salt: _Optional[bytes] = ..., max_draft_tokens: _Optional[int] = ..., provisional_first_token: _Optional[bool] = ..., min_chains: _Optional[int] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("reserved", "prefill_progress", "token", "finished", "queued", "resumed", "scale_changed", "provisional_token", "checksum")
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    SCALE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    reserved: Reserved
    prefill_progress: _common_pb2.PrefillProgress
    token: _common_pb2.Token
    finished: _common_pb2.Finished
    queued: _common_pb2.Queued
    resumed: Resumed
    scale_changed: _common_pb2.Scale
    provisional_token: _common_pb2.ProvisionalToken
    checksum: int
    def __init__(self, reserved: _Optional[_Union[Reserved, _Mapping]] = ..., prefill_progress: _Optional[_Union[_common_pb2.PrefillProgress, _Mapping]] = ..., token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., finished: _Optional[_Union[_common_pb2.Finished, _Mapping]] = ..., queued: _Optional[_Union[_common_pb2.Queued, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., scale_changed: _Optional[_Union[_common_pb2.Scale, _Mapping]] = ..., provisional_token: _Optional[_Union[_common_pb2.ProvisionalToken, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class ResumeDecode(_message.Message):
    __slots__ = ("answer_key", "num_tokens")
    ANSWER_KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    answer_key: str
    num_tokens: int
    def __init__(self, answer_key: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("request_id", "num_prompt_tokens", "num_chains", "max_new_tokens", "remaining_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHAINS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    num_prompt_tokens: int
    num_chains: int
    max_new_tokens: int
    remaining_s: float
    def __init__(self, request_id: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_chains: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., remaining_s: _Optional[float] = ...) -> None: ...

class CancelDecodeRequest(_message.Message):
    __slots__ = ("answer_key", "request_id", "checksum")
    ANSWER_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    answer_key: str
    request_id: str
    checksum: int
    def __init__(self, answer_key: _Optional[str] = ..., request_id: _Optional[str] = ..., checksum: _Optional[int] = ...) -> None: ...

class CancelDecodeResponse(_message.Message):
    __slots__ = ("checksum",)
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    checksum: int
    def __init__(self, checksum: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("num_pages",)
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    num_pages: int
    def __init__(self, num_pages: _Optional[int] = ...) -> None: ...
