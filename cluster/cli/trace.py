"""colm trace: where a request's time went, from the files that the processes wrote."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from cluster.cli.output import JsonFlag, print_json
from cluster.cli.trace_view import Span, in_order, read_spans
from colm.errors import ConfigError

_BAR = 40


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trace")(trace)


def trace(
    folder: Annotated[Path, typer.Argument(help="`[tracing] folder` of the cluster's options.")],
    trace_id: Annotated[str, typer.Argument(help="Of one trace, or how it begins; else the latest are listed.")] = "",
    last: Annotated[int, typer.Option(help="How many are listed.", min=1)] = 20,
    json: JsonFlag = False,
) -> None:
    """Show what a request waited for and what it did, process by process; `colm submit --json` says its trace id."""
    traces = read_spans(folder)
    if not trace_id:
        _list(list(traces.items())[-last:], json=json)
        return
    found = [name for name in traces if name.startswith(trace_id)]
    if len(found) != 1:
        have = f"{len(found)} traces begin so" if found else f"it is none of the {len(traces)} recorded"
        raise ConfigError(f"trace_id={trace_id!r}: {have} in {folder}; a process writes its spans within 1 s")
    spans = traces[found[0]]
    if json:
        print_json({"trace_id": found[0], "spans": [asdict(span) for span in spans]})
    else:
        _show(spans)


def _list(traces: list[tuple[str, list[Span]]], *, json: bool) -> None:
    if json:
        print_json({"traces": [asdict(spans[0]) for _, spans in traces]})
        return
    table = Table(Column("trace", no_wrap=True), "began", "what", "took", "error", "")
    for name, spans in traces:
        first = spans[0]
        began = datetime.fromtimestamp(first.began_ns / 1e9).astimezone()
        table.add_row(name, f"{began:%H:%M:%S}", first.name, _took(first), first.error, _facts(first))
    Console().print(table)


def _show(spans: list[Span]) -> None:
    began_ns = spans[0].began_ns
    whole_ns = max(1, max(span.ended_ns for span in spans) - began_ns)
    table = Table("process", Column("span", no_wrap=True), Column("took", justify="right"), "", "", box=None)
    for depth, span in in_order(spans):
        left = max(0, (span.began_ns - began_ns) * _BAR // whole_ns)
        width = max(1, (span.ended_ns - span.began_ns) * _BAR // whole_ns)
        bar = " " * min(left, _BAR - 1) + "━" * min(width, _BAR - min(left, _BAR - 1))
        color = "red" if span.error else "cyan"
        table.add_row(
            span.process, "  " * depth + span.name, _took(span), f"[{color}]{bar}[/]", span.error or _facts(span)
        )
    Console(highlight=False).print(table)


def _took(span: Span) -> str:
    return f"{span.seconds:.2f} s" if span.seconds >= 1 else f"{span.seconds * 1e3:.1f} ms"


def _facts(span: Span) -> str:
    return " ".join(f"{name}={value}" for name, value in span.facts.items())
