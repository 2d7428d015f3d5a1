"""Reads recorded spans back: which traces there are, and one of them as a tree over time."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A piece of a request's way."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty at the beginning of a trace; a client's span may be the parent, and is not here then."""
    name: str
    process: str
    began_ns: int
    """Since 1970, by the clock of its machine."""
    ended_ns: int
    error: str
    """Name of the error that ended it; empty without one."""
    facts: dict[str, str]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.ended_ns - self.began_ns) / 1e9


def read_spans(folder: Path) -> dict[str, list[Span]]:
    """The spans of all processes that recorded in a folder, by trace; the latest trace last.

    A line that was not written to its end is left out.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; `[tracing] folder` of the cluster's options says where traces are")
    traces: dict[str, list[Span]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl*")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                for span in _spans(line):
                    traces[span.trace_id].append(span)
    for spans in traces.values():
        spans.sort(key=lambda each: each.began_ns)
    return dict(sorted(traces.items(), key=lambda item: item[1][0].began_ns))


def in_order(spans: list[Span]) -> Iterator[tuple[int, Span]]:
    """The spans of a trace with their depth, each behind its parent, children by when they began."""
    children: dict[str, list[Span]] = defaultdict(list)
    here = {span.span_id for span in spans}
    for span in spans:
        children[span.parent_id if span.parent_id in here else ""].append(span)
    waiting = [(0, span) for span in reversed(children[""])]
    while waiting:
        depth, span = waiting.pop()
        yield depth, span
        waiting += [(depth + 1, child) for child in reversed(children[span.span_id])]


def _spans(line: str) -> Iterator[Span]:
    try:
        batch = json.loads(line)
    except ValueError:
        return
    for resource in batch["resourceSpans"]:
        process = _facts(resource["resource"]["attributes"])["service.name"].removeprefix("colm-serve.")
        for each in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            yield Span(
                trace_id=each["traceId"],
                span_id=each["spanId"],
                parent_id=each.get("parentSpanId", ""),
                name=each["name"],
                process=process,
                began_ns=int(each["startTimeUnixNano"]),
                ended_ns=int(each["endTimeUnixNano"]),
                error=each["status"].get("message", ""),
                facts=_facts(each["attributes"]),
            )


def _facts(attributes: list[dict[str, Any]]) -> dict[str, str]:
    return {each["key"]: str(next(iter(each["value"].values()))) for each in attributes}
