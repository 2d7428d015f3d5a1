from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttentionMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTENTION_MODE_UNSPECIFIED: _ClassVar[AttentionMode]
    ATTENTION_MODE_DENSE: _ClassVar[AttentionMode]
    ATTENTION_MODE_SPARSE: _ClassVar[AttentionMode]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_RAW: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]

class WaitsFor(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAITS_FOR_UNSPECIFIED: _ClassVar[WaitsFor]
    WAITS_FOR_DECODE_NODE: _ClassVar[WaitsFor]
    WAITS_FOR_PAGES: _ClassVar[WaitsFor]
    WAITS_FOR_PREFILL_NODE: _ClassVar[WaitsFor]
    WAITS_FOR_BATCH: _ClassVar[WaitsFor]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
ATTENTION_MODE_UNSPECIFIED: AttentionMode
ATTENTION_MODE_DENSE: AttentionMode
ATTENTION_MODE_SPARSE: AttentionMode
CODEC_UNSPECIFIED: Codec
CODEC_RAW: Codec
CODEC_INT8: Codec
WAITS_FOR_UNSPECIFIED: WaitsFor
WAITS_FOR_DECODE_NODE: WaitsFor
WAITS_FOR_PAGES: WaitsFor
WAITS_FOR_PREFILL_NODE: WaitsFor
WAITS_FOR_BATCH: WaitsFor
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "stop", "stop_token_ids", "top_logprobs", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias", "min_tokens", "json_schema", "regex")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: int
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_p: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    min_tokens: int
    json_schema: str
    regex: str
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., min_p: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., min_tokens: _Optional[int] = ..., json_schema: _Optional[str] = ..., regex: _Optional[str] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class Scale(_message.Message):
    __slots__ = ("num_chains", "min_chains")
    NUM_CHAINS_FIELD_NUMBER: _ClassVar[int]
    MIN_CHAINS_FIELD_NUMBER: _ClassVar[int]
    num_chains: int
    min_chains: int
    def __init__(self, num_chains: _Optional[int] = ..., min_chains: _Optional[int] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class EndOfPrompt(_message.Message):
    __slots__ = ("checksum",)
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    checksum: int
    def __init__(self, checksum: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "text", "logprob", "top_logprobs", "num_chains", "confirms_provisional")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHAINS_FIELD_NUMBER: _ClassVar[int]
    CONFIRMS_PROVISIONAL_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    num_chains: int
    confirms_provisional: bool
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., num_chains: _Optional[int] = ..., confirms_provisional: _Optional[bool] = ...) -> None: ...

class ProvisionalToken(_message.Message):
    __slots__ = ("token_id", "text")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("waits_for", "num_ahead", "estimated_wait_s")
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    NUM_AHEAD_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    waits_for: WaitsFor
    num_ahead: int
    estimated_wait_s: float
    def __init__(self, waits_for: _Optional[_Union[WaitsFor, str]] = ..., num_ahead: _Optional[int] = ..., estimated_wait_s: _Optional[float] = ...) -> None: ...

class PrefillProgress(_message.Message):
    __slots__ = ("num_tokens_done", "num_tokens_total")
    NUM_TOKENS_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    num_tokens_done: int
    num_tokens_total: int
    def __init__(self, num_tokens_done: _Optional[int] = ..., num_tokens_total: _Optional[int] = ...) -> None: ...

class LayerRecall(_message.Message):
    __slots__ = ("layer", "num_rows", "recall", "recall_bound", "num_dense_heads")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    RECALL_BOUND_FIELD_NUMBER: _ClassVar[int]
    NUM_DENSE_HEADS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    num_rows: int
    recall: float
    recall_bound: float
    num_dense_heads: int
    def __init__(self, layer: _Optional[int] = ..., num_rows: _Optional[int] = ..., recall: _Optional[float] = ..., recall_bound: _Optional[float] = ..., num_dense_heads: _Optional[int] = ...) -> None: ...

class SparseReport(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerRecall]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerRecall, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_prefill_tokens", "num_decode_prompt_tokens", "num_new_tokens", "kv_received_bytes", "num_kv_streams", "kv_shared_bytes", "kv_effective_bytes", "num_draft_tokens", "num_accepted_tokens", "num_prefill_cached_tokens", "num_decode_nodes", "num_cached_tokens")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_STREAMS_FIELD_NUMBER: _ClassVar[int]
    KV_SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_EFFECTIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_NODES_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_prefill_tokens: int
    num_decode_prompt_tokens: int
    num_new_tokens: int
    kv_received_bytes: int
    num_kv_streams: int
    kv_shared_bytes: int
    kv_effective_bytes: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_prefill_cached_tokens: int
    num_decode_nodes: int
    num_cached_tokens: int
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_prefill_tokens: _Optional[int] = ..., num_decode_prompt_tokens: _Optional[int] = ..., num_new_tokens: _Optional[int] = ..., kv_received_bytes: _Optional[int] = ..., num_kv_streams: _Optional[int] = ..., kv_shared_bytes: _Optional[int] = ..., kv_effective_bytes: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_prefill_cached_tokens: _Optional[int] = ..., num_decode_nodes: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "first_token_s", "decode_s", "provisional_token_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    provisional_token_s: float
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., first_token_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., provisional_token_s: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "usage", "timings", "text", "sparse")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    usage: Usage
    timings: Timings
    text: str
    sparse: SparseReport
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., text: _Optional[str] = ..., sparse: _Optional[_Union[SparseReport, _Mapping]] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("kind", "field", "value", "limit", "client_limit", "retry_after_s")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[ErrorDetail.Kind]
        KIND_INVALID_REQUEST: _ClassVar[ErrorDetail.Kind]
        KIND_UNKNOWN_MODEL: _ClassVar[ErrorDetail.Kind]
        KIND_UNAUTHENTICATED: _ClassVar[ErrorDetail.Kind]
        KIND_CAPACITY_EXCEEDED: _ClassVar[ErrorDetail.Kind]
        KIND_PEER_UNAVAILABLE: _ClassVar[ErrorDetail.Kind]
        KIND_FINGERPRINT_MISMATCH: _ClassVar[ErrorDetail.Kind]
        KIND_DEADLINE_EXCEEDED: _ClassVar[ErrorDetail.Kind]
        KIND_INTERNAL: _ClassVar[ErrorDetail.Kind]
        KIND_LEASE_EXPIRED: _ClassVar[ErrorDetail.Kind]
        KIND_NOT_FINITE: _ClassVar[ErrorDetail.Kind]
        KIND_PREFILL_UNAVAILABLE: _ClassVar[ErrorDetail.Kind]
        KIND_UNKNOWN_ANSWER: _ClassVar[ErrorDetail.Kind]
        KIND_GOING_AWAY: _ClassVar[ErrorDetail.Kind]
        KIND_MODEL_REPLACED: _ClassVar[ErrorDetail.Kind]
    KIND_UNSPECIFIED: ErrorDetail.Kind
    KIND_INVALID_REQUEST: ErrorDetail.Kind
    KIND_UNKNOWN_MODEL: ErrorDetail.Kind
    KIND_UNAUTHENTICATED: ErrorDetail.Kind
    KIND_CAPACITY_EXCEEDED: ErrorDetail.Kind
    KIND_PEER_UNAVAILABLE: ErrorDetail.Kind
    KIND_FINGERPRINT_MISMATCH: ErrorDetail.Kind
    KIND_DEADLINE_EXCEEDED: ErrorDetail.Kind
    KIND_INTERNAL: ErrorDetail.Kind
    KIND_LEASE_EXPIRED: ErrorDetail.Kind
    KIND_NOT_FINITE: ErrorDetail.Kind
    KIND_PREFILL_UNAVAILABLE: ErrorDetail.Kind
    KIND_UNKNOWN_ANSWER: ErrorDetail.Kind
    KIND_GOING_AWAY: ErrorDetail.Kind
    KIND_MODEL_REPLACED: ErrorDetail.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_LIMIT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    kind: ErrorDetail.Kind
    field: str
    value: str
    limit: str
    client_limit: str
    retry_after_s: float
    def __init__(self, kind: _Optional[_Union[ErrorDetail.Kind, str]] = ..., field: _Optional[str] = ..., value: _Optional[str] = ..., limit: _Optional[str] = ..., client_limit: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...
