from colm.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role

class GenerateRequest(_message.Message):
    __slots__ = ("open", "document", "token_ids", "end_of_prompt", "resume", "change_scale", "checksum")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    END_OF_PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CHANGE_SCALE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    open: OpenGenerate
    document: bytes
    token_ids: _common_pb2.TokenIds
    end_of_prompt: _common_pb2.EndOfPrompt
    resume: ResumeGenerate
    change_scale: _common_pb2.Scale
    checksum: int
    def __init__(self, open: _Optional[_Union[OpenGenerate, _Mapping]] = ..., document: _Optional[bytes] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., end_of_prompt: _Optional[_Union[_common_pb2.EndOfPrompt, _Mapping]] = ..., resume: _Optional[_Union[ResumeGenerate, _Mapping]] = ..., change_scale: _Optional[_Union[_common_pb2.Scale, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class OpenGenerate(_message.Message):
    __slots__ = ("model", "prompt", "chat", "num_chains", "max_new_tokens", "sampling", "timeout_s", "answer_key", "answer_token_ids", "revision", "attention", "history", "kv_codec", "max_draft_tokens", "provisional_first_token", "min_chains")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    NUM_CHAINS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    ANSWER_KEY_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    KV_CODEC_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MIN_CHAINS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    chat: bool
    num_chains: int
    max_new_tokens: int
    sampling: _common_pb2.Sampling
    timeout_s: float
    answer_key: str
    answer_token_ids: _containers.RepeatedScalarFieldContainer[int]
    revision: str
    attention: _common_pb2.AttentionMode
    history: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    kv_codec: _common_pb2.Codec
    max_draft_tokens: int
    provisional_first_token: bool
    min_chains: int
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., chat: _Optional[bool] = ..., num_chains: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., timeout_s: _Optional[float] = ..., answer_key: _Optional[str] = ..., answer_token_ids: _Optional[_Iterable[int]] = ..., revision: _Optional[str] = ..., attention: _Optional[_Union[_common_pb2.AttentionMode, str]] = ..., history: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., kv_codec: _Optional[_Union[_common_pb2.Codec, str]] = ..., max_draft_tokens: _Optional[int] = ..., provisional_first_token: _Optional[bool] = ..., min_chains: _Optional[int] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ResumeGenerate(_message.Message):
    __slots__ = ("answer_key", "num_tokens")
    ANSWER_KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    answer_key: str
    num_tokens: int
    def __init__(self, answer_key: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "prefill_progress", "token", "finished", "queued", "scale_changed", "provisional_token", "checksum")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    SCALE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    prefill_progress: _common_pb2.PrefillProgress
    token: _common_pb2.Token
    finished: _common_pb2.Finished
    queued: _common_pb2.Queued
    scale_changed: _common_pb2.Scale
    provisional_token: _common_pb2.ProvisionalToken
    checksum: int
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., prefill_progress: _Optional[_Union[_common_pb2.PrefillProgress, _Mapping]] = ..., token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., finished: _Optional[_Union[_common_pb2.Finished, _Mapping]] = ..., queued: _Optional[_Union[_common_pb2.Queued, _Mapping]] = ..., scale_changed: _Optional[_Union[_common_pb2.Scale, _Mapping]] = ..., provisional_token: _Optional[_Union[_common_pb2.ProvisionalToken, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_id", "model", "num_prompt_tokens", "num_chains", "max_new_tokens", "timeout_s", "trace_id", "revision")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHAINS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    num_prompt_tokens: int
    num_chains: int
    max_new_tokens: int
    timeout_s: float
    trace_id: str
    revision: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_chains: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., timeout_s: _Optional[float] = ..., trace_id: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class GetClusterStatusRequest(_message.Message):
    __slots__ = ("checksum",)
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    checksum: int
    def __init__(self, checksum: _Optional[int] = ...) -> None: ...

class GetClusterStatusResponse(_message.Message):
    __slots__ = ("models", "nodes", "num_active_requests", "metrics_address", "pools", "checksum")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    NUM_ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    num_active_requests: int
    metrics_address: str
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    checksum: int
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., num_active_requests: _Optional[int] = ..., metrics_address: _Optional[str] = ..., pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "chains", "max_context_tokens", "fingerprint", "reads_text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    READS_TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    chains: _containers.RepeatedScalarFieldContainer[int]
    max_context_tokens: int
    fingerprint: str
    reads_text: bool
    def __init__(self, name: _Optional[str] = ..., chains: _Optional[_Iterable[int]] = ..., max_context_tokens: _Optional[int] = ..., fingerprint: _Optional[str] = ..., reads_text: _Optional[bool] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("role", "num_present", "num_wanted", "min_replicas", "max_replicas", "demand", "queued_s", "variant")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NUM_PRESENT_FIELD_NUMBER: _ClassVar[int]
    NUM_WANTED_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    num_present: int
    num_wanted: int
    min_replicas: int
    max_replicas: int
    demand: float
    queued_s: float
    variant: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., num_present: _Optional[int] = ..., num_wanted: _Optional[int] = ..., min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., demand: _Optional[float] = ..., queued_s: _Optional[float] = ..., variant: _Optional[str] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("role", "replica_id", "address", "pid", "host", "num_active_requests", "num_queued_requests", "num_pages_total", "num_pages_used", "resident_bytes", "age_s", "ray_node_id", "num_leases", "metrics_address", "variant")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    NUM_ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    RAY_NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    replica_id: str
    address: str
    pid: int
    host: str
    num_active_requests: int
    num_queued_requests: int
    num_pages_total: int
    num_pages_used: int
    resident_bytes: int
    age_s: float
    ray_node_id: str
    num_leases: int
    metrics_address: str
    variant: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., replica_id: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., num_active_requests: _Optional[int] = ..., num_queued_requests: _Optional[int] = ..., num_pages_total: _Optional[int] = ..., num_pages_used: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., age_s: _Optional[float] = ..., ray_node_id: _Optional[str] = ..., num_leases: _Optional[int] = ..., metrics_address: _Optional[str] = ..., variant: _Optional[str] = ...) -> None: ...
