"""Conversion between domain objects and messages. Only the edges of a process use pb2 classes."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import xxhash
from google.protobuf.message import Message
from numpy.typing import NDArray

from colm.errors import InvalidRequest
from colm.events import (
    Accepted,
    Event,
    Finished,
    FinishReason,
    LayerRecall,
    PrefillProgress,
    ProvisionalToken,
    Queued,
    Reconnecting,
    Reserved,
    Resumed,
    ScaleChanged,
    SparseReport,
    Timings,
    Token,
    Usage,
    WaitsFor,
)
from colm.nodes import ClusterStatus, ModelStatus, NodeReport, NodeStatus, PoolStatus, ProcessFacts, Role
from colm.request import AttentionMode, ChatMessage, GenerateRequest, KvCodec
from colm.sampling import Constraint, SamplingParams
from colm.scale import Scale, ScaleWish
from colm.wire.seal import Unreadable, readable
from colm.wire.v1 import common_pb2 as pb
from colm.wire.v1 import decode_service_pb2 as decode_pb
from colm.wire.v1 import generation_service_pb2 as generation_pb

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Message = TypeVar("_Message", bound=Message)
_Record = TypeVar("_Record", bound="DataclassInstance")
_Word = TypeVar("_Word", bound=str)
_Value = TypeVar("_Value", bound=int)

IDS_PER_MESSAGE = 1 << 16

_ROLES = {Role.PREFILL: generation_pb.ROLE_PREFILL, Role.DECODE: generation_pb.ROLE_DECODE}
_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_ATTENTION_MODES: dict[AttentionMode, pb.AttentionMode] = {
    "dense": pb.ATTENTION_MODE_DENSE,
    "sparse": pb.ATTENTION_MODE_SPARSE,
}
CODECS: Final[dict[KvCodec, pb.Codec]] = {"raw": pb.CODEC_RAW, "int8": pb.CODEC_INT8}
_WAITS_FOR = {
    WaitsFor.DECODE_NODE: pb.WAITS_FOR_DECODE_NODE,
    WaitsFor.PAGES: pb.WAITS_FOR_PAGES,
    WaitsFor.PREFILL_NODE: pb.WAITS_FOR_PREFILL_NODE,
    WaitsFor.BATCH: pb.WAITS_FOR_BATCH,
}


def token_id_pieces(token_ids: NDArray[np.int64]) -> Iterator[pb.TokenIds]:
    """Cut a prompt into messages far below gRPC's limit."""
    for start in range(0, len(token_ids), IDS_PER_MESSAGE):
        yield pb.TokenIds(ids=token_ids[start : start + IDS_PER_MESSAGE].tolist())


def end_of_prompt(token_ids: NDArray[np.int64]) -> pb.EndOfPrompt:
    """The end of a prompt whose ids must arrive as they are here."""
    return pb.EndOfPrompt(checksum=ids_checksum(token_ids))


def ids_checksum(token_ids: NDArray[np.int64]) -> int:
    """XXH3-64 of token ids, as `end_of_prompt` brings it."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(token_ids, dtype="<i8").data)


def token_ids_from_pb(message: pb.TokenIds) -> NDArray[np.int64]:
    """Wire to domain."""
    return np.array(message.ids, dtype=np.int64)


def sampling_to_pb(params: SamplingParams) -> pb.Sampling:
    """Domain to wire."""
    message = pb.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        top_logprobs=params.top_logprobs,
        ignore_eos=params.ignore_eos,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        min_p=params.min_p,
        logit_bias=[pb.LogitBias(token_id=token_id, bias=bias) for token_id, bias in params.logit_bias],
        min_tokens=params.min_tokens,
    )
    if params.seed is not None:
        message.seed = params.seed
    if params.constraint is not None:
        setattr(message, params.constraint.kind, params.constraint.text)
    return message


def sampling_from_pb(message: pb.Sampling) -> SamplingParams:
    """Wire to domain.

    Raises:
        InvalidRequest: a value out of range.
    """
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        top_logprobs=message.top_logprobs,
        ignore_eos=message.ignore_eos,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        min_p=message.min_p,
        logit_bias=tuple((each.token_id, each.bias) for each in message.logit_bias),
        min_tokens=message.min_tokens,
        constraint=_constraint_from_pb(message),
    )


def _constraint_from_pb(message: pb.Sampling) -> Constraint | None:
    kind = message.WhichOneof("constraint")
    return None if kind is None else Constraint(kind=kind, text=getattr(message, kind))


def scale_to_pb(scale: Scale | ScaleWish) -> pb.Scale:
    """Domain to wire; what is None is unset."""
    return pb.Scale(num_chains=scale.num_chains, min_chains=scale.min_chains)


def scale_wish_from_pb(message: pb.Scale) -> ScaleWish:
    """Wire to domain."""
    return _from_pb(ScaleWish, message)


def attention_to_pb(mode: AttentionMode) -> pb.AttentionMode:
    """Domain to wire."""
    return _ATTENTION_MODES[mode]


def attention_from_pb(value: pb.AttentionMode) -> AttentionMode:
    """Wire to domain.

    Raises:
        InvalidRequest: a mode of a newer client.
    """
    return _word("attention", value, _ATTENTION_MODES, "dense")


def kv_codec_from_pb(value: pb.Codec) -> KvCodec:
    """Wire to domain.

    Raises:
        InvalidRequest: a codec of a newer client.
    """
    return _word("kv_codec", value, CODECS, "raw")


def _word(field: str, value: _Value, values: Mapping[_Word, _Value], unset: _Word) -> _Word:
    """The word that a value of an enumeration stands for; 0 is a field that was not set."""
    if value == 0:
        return unset
    for word, known in values.items():
        if value == known:
            return word
    raise InvalidRequest(field, value, f"must be {' or '.join(values)}")


def sparse_report_to_pb(report: SparseReport) -> pb.SparseReport:
    """Domain to wire."""
    return pb.SparseReport(layers=[_to_pb(pb.LayerRecall, layer) for layer in report.layers])


def sparse_report_from_pb(message: pb.SparseReport) -> SparseReport:
    """Wire to domain."""
    return SparseReport(layers=tuple(_from_pb(LayerRecall, layer) for layer in message.layers))


def _to_pb(message_type: type[_Message], record: "DataclassInstance") -> _Message:
    """A message from a flat record, whose fields have the same names on both sides."""
    return message_type(**asdict(record))


def _from_pb(record_type: type[_Record], message: Message) -> _Record:
    return record_type(**{field.name: _optional(message, field.name) for field in fields(record_type)})


def _optional(message: Message, name: str) -> Any:
    """A field's value; None of one that may be unset, and is."""
    is_unset = message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name)
    return None if is_unset else getattr(message, name)


def queued_to_pb(event: Queued) -> pb.Queued:
    """Domain to wire."""
    return pb.Queued(
        waits_for=_WAITS_FOR[event.waits_for], num_ahead=event.num_ahead, estimated_wait_s=event.estimated_wait_s
    )


def token_to_pb(event: Token) -> pb.Token:
    """Domain to wire."""
    return pb.Token(
        token_id=event.token_id,
        text=event.text,
        logprob=event.logprob,
        num_chains=event.num_chains,
        top_logprobs=[pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in event.top_logprobs],
        confirms_provisional=event.confirms_provisional,
    )


def finished_to_pb(event: Finished) -> pb.Finished:
    """Domain to wire."""
    return pb.Finished(
        reason=_REASONS[event.reason],
        usage=_to_pb(pb.Usage, event.usage),
        timings=_to_pb(pb.Timings, event.timings),
        text=event.text,
        sparse=None if event.sparse is None else sparse_report_to_pb(event.sparse),
    )


def generate_request_to_pb(request: GenerateRequest) -> generation_pb.OpenGenerate:
    """Domain to wire."""
    message = generation_pb.OpenGenerate(
        model=request.model,
        prompt=request.prompt,
        sampling=sampling_to_pb(request.sampling),
        attention=attention_to_pb(request.attention),
        history=[generation_pb.ChatMessage(role=each.role, content=each.content) for each in request.history],
        kv_codec=CODECS[request.kv_codec],
        answer_key=request.answer_key,
        answer_token_ids=request.answer_token_ids,
        revision=request.revision,
        num_chains=request.num_chains,
        min_chains=request.min_chains,
        provisional_first_token=request.provisional_first_token,
    )
    if request.chat is not None:
        message.chat = request.chat
    if request.max_new_tokens is not None:
        message.max_new_tokens = int(request.max_new_tokens)
    if request.timeout_s is not None:
        message.timeout_s = float(request.timeout_s)
    if request.max_draft_tokens is not None:
        message.max_draft_tokens = int(request.max_draft_tokens)
    return message


def generate_request_from_pb(message: generation_pb.OpenGenerate) -> GenerateRequest:
    """Wire to domain.

    Raises:
        InvalidRequest: a value out of range.
    """
    chosen = {
        name: getattr(message, name)
        for name in ("chat", "num_chains", "min_chains", "max_new_tokens", "timeout_s", "max_draft_tokens")
        if message.HasField(name)
    }
    return GenerateRequest(
        model=message.model,
        prompt=message.prompt,
        sampling=sampling_from_pb(message.sampling),
        attention=attention_from_pb(message.attention),
        history=tuple(_chat_message(each) for each in message.history),
        kv_codec=kv_codec_from_pb(message.kv_codec),
        answer_key=message.answer_key,
        answer_token_ids=tuple(message.answer_token_ids),
        revision=message.revision,
        provisional_first_token=message.provisional_first_token,
        **chosen,
    )


def _chat_message(message: generation_pb.ChatMessage) -> ChatMessage:
    role: Any = message.role  # checked where it is made
    return ChatMessage(role=role, content=message.content)


def _event_to_pb(event: Event) -> dict[str, Any]:
    """The field of a response that carries an event, the same in every service."""
    match event:
        case Accepted():
            return {"accepted": _to_pb(generation_pb.Accepted, event)}
        case Queued():
            return {"queued": queued_to_pb(event)}
        case Resumed():
            return {"resumed": _to_pb(decode_pb.Resumed, event)}
        case Reserved():
            return {"reserved": _to_pb(decode_pb.Reserved, event)}
        case PrefillProgress():
            return {"prefill_progress": _to_pb(pb.PrefillProgress, event)}
        case ProvisionalToken():
            return {"provisional_token": _to_pb(pb.ProvisionalToken, event)}
        case Token():
            return {"token": token_to_pb(event)}
        case ScaleChanged():
            return {"scale_changed": _to_pb(pb.Scale, event)}
        case Finished():
            return {"finished": finished_to_pb(event)}
        case Reconnecting():
            raise AssertionError("an event of a client that is sent")


def decode_response(event: Event) -> decode_pb.DecodeResponse:
    """An event as a decode node sends it. `Accepted` is refused: only the gateway sends it."""
    return decode_pb.DecodeResponse(**_event_to_pb(event))


def gateway_response(event: Event) -> generation_pb.GenerateResponse:
    """An event as the gateway sends it. `Reserved` and `Resumed` are refused: they stay between the nodes."""
    return generation_pb.GenerateResponse(**_event_to_pb(event))


def cluster_status_to_pb(status: ClusterStatus) -> generation_pb.GetClusterStatusResponse:
    """Domain to wire."""
    nodes = []
    for node in status.nodes:
        facts = asdict(node.report)
        process, role = facts.pop("process"), facts.pop("role")
        del facts["load"]  # what it is for is in `pools`
        nodes.append(generation_pb.Node(role=_ROLES[role], age_s=node.age_s, **facts, **process))
    return generation_pb.GetClusterStatusResponse(
        models=[_to_pb(generation_pb.Model, model) for model in status.models],
        nodes=nodes,
        num_active_requests=status.num_active_requests,
        metrics_address=status.metrics_address,
        pools=[generation_pb.Pool(**asdict(pool) | {"role": _ROLES[pool.role]}) for pool in status.pools],
    )


def cluster_status_from_pb(received: generation_pb.GetClusterStatusResponse | Unreadable) -> ClusterStatus:
    """Wire to domain, at the client.

    Raises:
        ConnectionLost: it was damaged on the way.
    """
    message = readable(received)
    roles = {value: role for role, value in _ROLES.items()}
    nodes = []
    for node in message.nodes:
        own = {field.name for field in fields(NodeReport)} - {"role", "process", "load"}
        facts = {name: getattr(node, name) for name in own}
        report = NodeReport(role=roles[node.role], process=_from_pb(ProcessFacts, node), **facts)
        nodes.append(NodeStatus(report=report, age_s=node.age_s))
    models = [
        ModelStatus(
            name=model.name,
            chains=tuple(model.chains),
            max_context_tokens=model.max_context_tokens,
            fingerprint=model.fingerprint,
            reads_text=model.reads_text,
        )
        for model in message.models
    ]
    return ClusterStatus(
        models=tuple(models),
        nodes=tuple(nodes),
        num_active_requests=message.num_active_requests,
        metrics_address=message.metrics_address,
        pools=tuple(replace(_from_pb(PoolStatus, pool), role=roles[pool.role]) for pool in message.pools),
    )


def event_from_pb(received: generation_pb.GenerateResponse | decode_pb.DecodeResponse | Unreadable) -> Event:
    """Wire to domain, at the client and at the gateway.

    Raises:
        ConnectionLost: it was damaged on the way.
        ValueError: a message of no known kind.
    """
    message = readable(received)
    kind = message.WhichOneof("event")
    body: Any = None if kind is None else getattr(message, kind)
    match kind:
        case "accepted":
            return _from_pb(Accepted, body)
        case "queued":
            return queued_from_pb(body)
        case "resumed":
            return _from_pb(Resumed, body)
        case "reserved":
            return _from_pb(Reserved, body)
        case "prefill_progress":
            return _from_pb(PrefillProgress, body)
        case "provisional_token":
            return _from_pb(ProvisionalToken, body)
        case "token":
            return _token(body)
        case "scale_changed":
            return _from_pb(ScaleChanged, body)
        case "finished":
            return _finished(body)
        case _:
            raise ValueError(f"the server sent an event of unknown kind {kind!r}")


def queued_from_pb(queued: pb.Queued) -> Queued:
    """Wire to domain.

    Raises:
        ValueError: the request waits for nothing that is known here.
    """
    waits_for = {value: key for key, value in _WAITS_FOR.items()}
    if queued.waits_for not in waits_for:
        raise ValueError(f"the server queued the request for an unknown thing {queued.waits_for}")
    return replace(_from_pb(Queued, queued), waits_for=waits_for[queued.waits_for])


def _token(token: pb.Token) -> Token:
    top_logprobs = tuple((entry.token_id, entry.logprob) for entry in token.top_logprobs)
    return replace(_from_pb(Token, token), top_logprobs=top_logprobs)


def _finished(finished: pb.Finished) -> Finished:
    reasons = {value: reason for reason, value in _REASONS.items()}
    if finished.reason not in reasons:
        raise ValueError(f"the server ended the answer for an unknown reason {finished.reason}")
    return Finished(
        reason=reasons[finished.reason],
        usage=_from_pb(Usage, finished.usage),
        timings=_from_pb(Timings, finished.timings),
        text=finished.text,
        sparse=sparse_report_from_pb(finished.sparse) if finished.HasField("sparse") else None,
    )
