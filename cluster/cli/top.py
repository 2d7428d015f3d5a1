"""colm top: a cluster, watched."""

import time
from collections.abc import Iterator
from itertools import count
from typing import Annotated

import typer
from pydantic import TypeAdapter
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table

from cluster.cli.output import DEFAULT_STATE_DIR, StateDir, human_bytes, interruptible, print_json
from cluster.state import ClusterState
from cluster.top import ClusterView, Watch
from colm.client import Client
from colm.nodes import Role

_AS_JSON = TypeAdapter(ClusterView)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("top")(top)


def top(
    interval: Annotated[float, typer.Option(help="Seconds from one look to the next.", min=0.2)] = 2.0,
    looks: Annotated[int | None, typer.Option(help="End after so many; else Ctrl-C does.", min=1)] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a look.")] = False,
) -> None:
    """Watch the roles, their lines and how fast they are; rates are those since the last look."""
    state = ClusterState.require(state_dir)
    with interruptible("stopped"), Client(state.gateway_address, state.security) as client:
        views = _views(Watch(client.cluster_status), interval, looks)
        if json:
            for view in views:
                print_json(_AS_JSON.dump_python(view, mode="json"))
        else:
            with Live(console=Console(), auto_refresh=False) as live:
                for view in views:
                    live.update(_screen(view), refresh=True)


def _views(watch: Watch, interval_s: float, looks: int | None) -> Iterator[ClusterView]:
    watch.look()  # has nothing to compare with, and only begins the next
    for _ in count() if looks is None else range(looks):
        time.sleep(interval_s)
        yield watch.look()


def _screen(view: ClusterView) -> Group:
    gateway = Table(
        "gateway", "requests/s", "errors/s", "prompt tok/s", "new tok/s", "first token", "p95", "token", "p95"
    )
    several = view.models if len(view.models) > 1 else {}
    for name, it in {"": view.gateway, **several}.items():
        gateway.add_row(
            f"{name} {it.num_active} active, {_number(it.num_waiting)} waiting".lstrip(),
            _number(it.requests_per_s),
            _number(it.errors_per_s),
            _number(it.prompt_tokens_per_s),
            _number(it.new_tokens_per_s),
            *map(_seconds, (it.first_token_p50_s, it.first_token_p95_s, it.inter_token_p50_s, it.inter_token_p95_s)),
        )
    address = Column("prefill", no_wrap=True)
    prefill = Table(
        address, "active", "queued", "work to do", "busy", "tok/s", "prefix hits", "KV/s", "unread KV", "memory"
    )
    for node in view.prefill:
        prefill.add_row(
            node.address,
            str(node.num_active),
            str(node.num_queued),
            _seconds(node.work_s),
            _share(node.busy),
            _number(node.tokens_per_s),
            _share(node.prefix_hits),
            _bytes(node.kv_bytes_per_s),
            _bytes(node.window_bytes),
            human_bytes(node.resident_bytes),
        )
    address = Column("decode", no_wrap=True)
    decode = Table(
        address,
        "active",
        "queued",
        "decoding",
        "pages",
        "prefix hits",
        "busy",
        "step",
        "tok/s",
        "drafts kept",
        "memory",
    )
    for each in view.decode:
        decode.add_row(
            f"{each.address} {each.model}" if several else each.address,
            str(each.num_active),
            str(each.num_queued),
            _number(each.num_decoding),
            f"{each.num_pages_used} / {each.num_pages_total}",
            _share(each.prefix_hits),
            _share(each.busy),
            _seconds(each.step_s),
            _number(each.tokens_per_s),
            _share(each.accepted),
            human_bytes(each.resident_bytes),
        )
    pools = Table("pool", "replicas", "wanted", "limits", "load asks for", "queue")
    for pool in view.pools:
        pools.add_row(
            pool.name,
            str(pool.num_present),
            str(pool.num_wanted),
            f"{pool.min_replicas} to {pool.max_replicas}",
            f"{pool.demand:.2f}",
            _seconds(pool.queued_s) if pool.role is Role.PREFILL else "-",
        )
    unread = f"no metrics from here of: {', '.join(view.unread)}" if view.unread else ""
    errors = (
        "errors: " + ", ".join(f"{outcome} {count}" for outcome, count in found)
        if (found := view.gateway.errors)
        else ""
    )
    return Group(gateway, prefill, decode, *([pools] if view.pools else []), *filter(None, (errors, unread)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 and value % 1 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else human_bytes(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s"
