"""Errors as gRPC carries them: a status code, a message, and a typed detail in the trailing metadata."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

import grpc

from colm.errors import (
    CallDropped,
    CapacityExceeded,
    ColmError,
    ConnectionLost,
    DeadlineExceeded,
    FingerprintMismatch,
    GoingAway,
    InvalidRequest,
    LeaseExpired,
    ModelReplaced,
    NotFinite,
    PeerFailed,
    PeerUnavailable,
    PrefillUnavailable,
    Unauthenticated,
    UnknownAnswer,
    UnknownModel,
)
from colm.wire.v1 import common_pb2 as pb

logger = logging.getLogger(__name__)

DETAIL_KEY = "colm-error-bin"
_CUT = "Stream removed"
"""gRPC's own words, under UNKNOWN, where a connection broke in the middle of a TLS record."""
_MAX_RETRY_AFTER_S = 86_400.0
_Kind = pb.ErrorDetail

# Subclasses stand before their bases: the first match wins.
_BY_ERROR: list[tuple[type[ColmError], grpc.StatusCode, "pb.ErrorDetail.Kind"]] = [
    (UnknownModel, grpc.StatusCode.NOT_FOUND, _Kind.KIND_UNKNOWN_MODEL),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, _Kind.KIND_INVALID_REQUEST),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, _Kind.KIND_UNAUTHENTICATED),
    (UnknownAnswer, grpc.StatusCode.NOT_FOUND, _Kind.KIND_UNKNOWN_ANSWER),
    (CapacityExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED, _Kind.KIND_CAPACITY_EXCEEDED),
    (LeaseExpired, grpc.StatusCode.UNAVAILABLE, _Kind.KIND_LEASE_EXPIRED),
    (GoingAway, grpc.StatusCode.UNAVAILABLE, _Kind.KIND_GOING_AWAY),
    (PrefillUnavailable, grpc.StatusCode.UNAVAILABLE, _Kind.KIND_PREFILL_UNAVAILABLE),
    (PeerUnavailable, grpc.StatusCode.UNAVAILABLE, _Kind.KIND_PEER_UNAVAILABLE),
    (ModelReplaced, grpc.StatusCode.FAILED_PRECONDITION, _Kind.KIND_MODEL_REPLACED),
    (FingerprintMismatch, grpc.StatusCode.FAILED_PRECONDITION, _Kind.KIND_FINGERPRINT_MISMATCH),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, _Kind.KIND_DEADLINE_EXCEEDED),
    (NotFinite, grpc.StatusCode.INTERNAL, _Kind.KIND_NOT_FINITE),
]


async def abort(context: grpc.aio.ServicerContext, error: ColmError) -> NoReturn:
    """End a call with the status of a typed error; a caller that is gone makes it a CancelledError."""
    internal = (ColmError, grpc.StatusCode.INTERNAL, _Kind.KIND_INTERNAL)
    _, code, detail_kind = next((row for row in _BY_ERROR if isinstance(error, row[0])), internal)
    detail = pb.ErrorDetail(kind=detail_kind)
    if isinstance(error, InvalidRequest):
        detail.field, detail.value, detail.limit = error.field, error.value, error.limit
    if isinstance(error, CapacityExceeded):
        detail.client_limit, detail.retry_after_s = error.client_limit, error.retry_after_s
    metadata = ((DETAIL_KEY, detail.SerializeToString()),)
    with _caller_may_be_gone():
        await context.abort(code, str(error), metadata)
    raise AssertionError("abort returned")


@contextmanager
def _caller_may_be_gone() -> Iterator[None]:
    """Sending to a caller that has gone fails, as gRPC says, inside gRPC; here it cancels the handler."""
    try:
        yield
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone


@asynccontextmanager
async def answering(context: grpc.aio.ServicerContext, call: str) -> AsyncIterator[None]:
    """Turn whatever a handler raises into exactly one status; cancellation passes through.

    What every call begins with is sent at once: gRPC sends it with the first message otherwise, and where that write is
    cancelled, by a deadline or by what else ends the handler, the status would never follow.
    """
    try:
        with _caller_may_be_gone():
            await context.send_initial_metadata(())
        yield
    except ColmError as error:
        logger.info("%s.failed error=%s message=%s", call, type(error).__name__, error)
        await abort(context, error)
    except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in Rust is no Exception; gRPC answers for neither
        logger.exception("%s.failed by a defect of ours", call)
        await abort(context, ColmError(f"internal error in {call}; the node's log has the trace"))


@contextmanager
def rpc_errors(peer: str) -> Iterator[None]:
    """Turn whatever a blocking call fails with into one typed error; see `Outcome.errors` for the asyncio API."""
    try:
        yield
    except grpc.RpcError as err:
        raise error_of(err, peer) from err


def error_of(error: grpc.RpcError, peer: str) -> ColmError:
    """The typed error behind a failed call.

    Args:
        error: what gRPC raised; it must carry a status.
        peer: who was called, for the message.
    """
    call: grpc.Call = error  # every RpcError raised by a stub is a Call too
    code, message = call.code(), call.details() or ""
    trailing = dict(call.trailing_metadata() or ())
    detail = pb.ErrorDetail()
    if isinstance(raw := trailing.get(DETAIL_KEY), bytes):
        detail.MergeFromString(raw)
    for kind, _, detail_kind in _BY_ERROR:
        if detail.kind == detail_kind:
            return _rebuild(kind, detail, message)
    if code == grpc.StatusCode.UNAVAILABLE or (code == grpc.StatusCode.UNKNOWN and message.startswith(_CUT)):
        return ConnectionLost(f"{peer} is not reachable or was lost: {message}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the deadline passed while waiting for {peer}")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return Unauthenticated(message)
    if code == grpc.StatusCode.CANCELLED:
        # A server that stops drops the calls that have come and that nobody has taken yet; gRPC calls that so.
        return CallDropped(f"{peer} dropped the call: {message}")
    return PeerFailed(f"{peer}: {code.name}: {message}")


def _rebuild(kind: type[ColmError], detail: pb.ErrorDetail, message: str) -> ColmError:
    if issubclass(kind, CapacityExceeded):
        # A server of before the field leaves it unset; a broken one may say anything.
        is_said = detail.HasField("retry_after_s") and 0 <= detail.retry_after_s <= _MAX_RETRY_AFTER_S
        known = {"retry_after_s": detail.retry_after_s} if is_said else {}
        return kind(message, client_limit=detail.client_limit, **known)
    if not issubclass(kind, InvalidRequest):
        return kind(message)
    error = kind(detail.field, "", detail.limit)
    error.value = detail.value
    error.args = (message,)
    return error
