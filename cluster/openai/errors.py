"""Errors as OpenAI's clients know them: a status, and a body that names type, parameter and code."""

import logging
import math
from dataclasses import dataclass

from starlette.responses import JSONResponse

from colm.errors import (
    CapacityExceeded,
    ColmError,
    DeadlineExceeded,
    InvalidRequest,
    PeerUnavailable,
    Unauthenticated,
    UnknownModel,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    type: str
    code: str | None
    meaning: str


# Subclasses stand before their bases: the first match wins. The client tries 429 and 5xx again by itself.
_KINDS: tuple[tuple[type[ColmError], _Kind], ...] = (
    (UnknownModel, _Kind(404, "invalid_request_error", "model_not_found", "another model is served")),
    (InvalidRequest, _Kind(400, "invalid_request_error", None, "a field cannot be served; `param` names it")),
    (Unauthenticated, _Kind(401, "invalid_request_error", "invalid_api_key", "no token, or a wrong one")),
    (CapacityExceeded, _Kind(429, "rate_limit_error", "capacity_exceeded", "no room now, or a limit of the token")),
    (
        DeadlineExceeded,
        _Kind(504, "timeout_error", "deadline_exceeded", "the time for it, or for its body, is over"),
    ),
    (PeerUnavailable, _Kind(503, "server_error", "unavailable", "a process was lost, or the gateway is stopping")),
)
_DEFECT = _Kind(500, "server_error", None, "a defect, or a failure that trying again does not help")
_RETRY_S = 1
"""After which somebody else may be there, where a process is lost or the gateway stops."""


def statuses() -> dict[int, str]:
    """Every status of an error, and what it means."""
    return {kind.status: kind.meaning for _, kind in (*_KINDS, (ColmError, _DEFECT))}


def body_of(error: BaseException) -> dict[str, object]:
    """The body of an error's answer."""
    return _body(error, _kind(error))


def answer_of(error: BaseException) -> JSONResponse:
    """The whole answer."""
    kind = _kind(error)
    headers: dict[str, str] = {}
    if isinstance(error, CapacityExceeded):  # OpenAI's package waits so long, and tries again by itself
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif kind.status == 503:
        headers["Retry-After"] = str(_RETRY_S)
    return JSONResponse(_body(error, kind), kind.status, headers)


def _kind(error: BaseException) -> _Kind:
    return next((kind for base, kind in _KINDS if isinstance(error, base)), _DEFECT)


def _body(error: BaseException, kind: _Kind) -> dict[str, object]:
    if isinstance(error, ColmError):
        message = str(error)
        logger.info("http.failed error=%s message=%s", type(error).__name__, error)
    else:
        message = "internal error; the gateway's log has the trace"
        logger.error("http.failed by a defect of ours", exc_info=error)
    param = error.field if isinstance(error, InvalidRequest) else None
    return {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}
