"""Spans of a request's way through the processes, with one trace id. Off until a process calls `trace_to`.

A span is current in its task and in the tasks that this starts; `headers` carries it to the next process, in the form
of the W3C's Trace Context.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

logger = logging.getLogger(__name__)

Value = str | int | float | bool

MAX_FILE_BYTES = 64 << 20
"""Of one process; a full file is kept beside the next one, and the one before it is deleted."""

_DELAY_MS = 1000
"""How long a span may wait to be written; 2048 at most do, and what is more is lost."""
_CONTEXT = TraceContextTextMapPropagator()
_KIND_INTERNAL, _CODE_ERROR = 1, 2  # as OTLP numbers them

_tracer: trace.Tracer = trace.NoOpTracer()


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFiles:
    """Where processes record their spans."""

    folder: str
    """Made if it is not there, for this user alone."""
    share: float
    """Of the traces that begin in a process, 0 to 1; one that comes from another is recorded if it was there."""


def trace_to(files: TraceFiles, process: str) -> Callable[[], None]:
    """Record this process's spans in a file of its own, one line of OTLP's JSON for each batch of them.

    Args:
        files: where, and how many.
        process: what this process is, e.g. `decode`.

    Returns:
        Writes what is left, and ends it.

    Raises:
        OSError: the file cannot be written.
    """
    global _tracer
    folder, share = Path(files.folder), files.share
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    resource = Resource({"service.name": f"colm-serve.{process}", "process.pid": os.getpid()})
    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(share)), shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(_FileExporter(folder / f"{process}-{os.getpid()}.jsonl"), schedule_delay_millis=_DELAY_MS)
    )
    _tracer = provider.get_tracer("colm")
    _name_traces_in_logs()

    def end() -> None:
        global _tracer
        _tracer = trace.NoOpTracer()
        provider.shutdown()

    return end


@contextmanager
def span(name: str, **attributes: Value) -> Iterator[Callable[..., None]]:
    """Record the block as a child of the current span; yields a function that adds attributes.

    An exception is noted, by its name alone: messages may hold a user's text. Cancellation is none.
    """
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield lambda **more: current.set_attributes(more)
        except Exception as err:
            current.set_status(trace.StatusCode.ERROR, type(err).__name__)
            raise


@contextmanager
def continued(headers: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """In the block, be part of the trace that a call's headers name, if they name one."""
    carrier = {name: value for name, value in headers if name == "traceparent" and isinstance(value, str)}
    if not carrier:
        yield
        return
    token = context.attach(_CONTEXT.extract(carrier, context.Context()))
    try:
        yield
    finally:
        context.detach(token)


def headers() -> tuple[tuple[str, str], ...]:
    """What makes the callee's spans children of the current one; nothing where none is recorded."""
    carrier: dict[str, str] = {}
    _CONTEXT.inject(carrier)
    return tuple(carrier.items())


def trace_id() -> str:
    """The current trace in 32 hex digits; empty where none is recorded."""
    found = trace.get_current_span().get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid and found.trace_flags.sampled else ""


class _FileExporter(SpanExporter):
    """Appends batches to a file in the form that OpenTelemetry's collector reads (its `otlpjsonfile` receiver)."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600))
        self._file = RotatingFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=1, encoding="utf-8", delay=True)
        self._file.handleError = _lost  # type: ignore[method-assign]

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        line = json.dumps(_batch(spans), separators=(",", ":"))
        self._file.handle(logging.LogRecord("colm", logging.INFO, "", 0, line, None, None))
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()


def _lost(record: logging.LogRecord) -> None:  # noqa: ARG001 - logging's contract
    logger.error("trace.lost", exc_info=True)


def _batch(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    resource = {"attributes": _attributes(spans[0].resource.attributes)}
    scope = {"scope": {"name": "colm"}, "spans": [_span(each) for each in spans]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}


def _span(each: ReadableSpan) -> dict[str, Any]:
    assert each.context is not None
    record: dict[str, Any] = {
        "traceId": f"{each.context.trace_id:032x}",
        "spanId": f"{each.context.span_id:016x}",
        "name": each.name,
        "kind": _KIND_INTERNAL,
        "startTimeUnixNano": str(each.start_time),
        "endTimeUnixNano": str(each.end_time),
        "attributes": _attributes(each.attributes or {}),
        "status": {},
    }
    if each.parent is not None:
        record["parentSpanId"] = f"{each.parent.span_id:016x}"
    if each.status.status_code is trace.StatusCode.ERROR:
        record["status"] = {"code": _CODE_ERROR, "message": each.status.description or ""}
    return record


def _attributes(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in found.items()]


def _value(value: Any) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}  # 64 bits, which JSON's numbers do not hold
        case float():
            return {"doubleValue": value}
    return {"stringValue": str(value)}


_naming = threading.Lock()
_is_named = False


def _name_traces_in_logs() -> None:
    """Let each log line of ours that a traced request makes end with its trace's id."""
    global _is_named
    with _naming:
        if _is_named:
            return
        _is_named = True
    make = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.name.partition(".")[0] in _OURS and (found := trace_id()):
            record.msg = f"{record.msg} trace={found}"
        return record

    logging.setLogRecordFactory(made)


_OURS = {"colm", "prefill_node", "decode_node", "cluster"}
