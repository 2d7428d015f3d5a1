"""colm up, status, down, demo: the life of a cluster. Ray is imported only when one of them runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from cluster.cli.output import DEFAULT_STATE_DIR, JsonFlag, StateDir, human_bytes, note, print_json
from cluster.config import default_toml, load_config
from cluster.state import ClusterState
from colm.client import Client
from colm.wire.v1 import generation_service_pb2 as pb

_ROLE_NAMES = {pb.ROLE_PREFILL: "prefill", pb.ROLE_DECODE: "decode"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("up")(up)
    app.command("config")(config)
    app.command("status")(status)
    app.command("down")(down)
    app.command("demo")(demo)


def up(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file; `colm config` prints one to start from.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory.")] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill replicas.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode replicas.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway; 0 picks a free one.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    json: JsonFlag = False,
) -> None:
    """Start or join Ray and bring up the prefill pool, the decode pool and the gateway."""
    from cluster.lifecycle import up as bring_up

    overrides = {
        "model.path": model,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "gateway.port": port,
        "ray.address": ray_address,
    }
    state = bring_up(load_config(config_file, overrides), state_dir, note)
    note(f"up: gateway at {state.gateway_address}")
    note("next: colm submit FILE --prompt TEXT")
    if json:
        print_json({"gateway_address": state.gateway_address, "ray_address": state.ray_address})


def config() -> None:
    """Print every option with its meaning and its default, as a file to start from."""
    typer.echo(default_toml(), nl=False)


def status(state_dir: StateDir = DEFAULT_STATE_DIR, json: JsonFlag = False) -> None:
    """Show models, roles, addresses and load."""
    state = ClusterState.require(state_dir)
    with Client(state.gateway_address, state.security) as client:
        answer = client.cluster_status()
    nodes = [
        {
            "role": _ROLE_NAMES[node.role],
            "replica_id": node.replica_id,
            "address": node.address,
            "host": node.host,
            "ray_node_id": node.ray_node_id,
            "pid": node.pid,
            "num_active_requests": node.num_active_requests,
            "num_queued_requests": node.num_queued_requests,
            "num_pages_used": node.num_pages_used,
            "num_pages_total": node.num_pages_total,
            "resident_bytes": node.resident_bytes,
            "age_s": round(node.age_s, 2),
        }
        for node in answer.nodes
    ]
    models = [
        {
            "name": model.name,
            "chains": list(model.chains),
            "max_context_tokens": model.max_context_tokens,
            "fingerprint": model.fingerprint,
            "reads_text": model.reads_text,
        }
        for model in answer.models
    ]
    if json:
        print_json(
            {
                "gateway_address": state.gateway_address,
                "ray_address": state.ray_address,
                "num_active_requests": answer.num_active_requests,
                "models": models,
                "nodes": nodes,
            }
        )
        return
    console = Console()
    for model in answer.models:
        chains = ",".join(map(str, model.chains))
        console.print(
            f"model [bold]{model.name}[/] chains {{{chains}}} context {model.max_context_tokens} "
            f"kv fingerprint {model.fingerprint[:12]}",
            soft_wrap=True,
        )
    console.print(
        f"gateway {state.gateway_address}, {answer.num_active_requests} requests; Ray {state.ray_address}",
        soft_wrap=True,
    )
    table = Table("role", Column("address", no_wrap=True), "pid", "active", "queued", "KV pages", "memory")
    for node in answer.nodes:
        pages = f"{node.num_pages_used} / {node.num_pages_total}" if node.num_pages_total else "-"
        table.add_row(
            _ROLE_NAMES[node.role],
            node.address,
            str(node.pid),
            str(node.num_active_requests),
            str(node.num_queued_requests),
            pages,
            human_bytes(node.resident_bytes),
        )
    console.print(table)


def down(state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Stop the cluster; nothing is left running."""
    from cluster.lifecycle import down as bring_down

    note("down" if bring_down(state_dir, note) else f"no cluster is up (looked in {state_dir})")


def demo(
    model: Annotated[Path, typer.Option(help="Checkpoint directory of an instruct model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 160,
) -> None:
    """Bring up a cluster, read a chapter of the Python manual with it, ask a question, and take it down again.

    The last line of stdout is one JSON object with what was measured.
    """
    from cluster.demo import run_demo

    print_json(run_demo(model, max_new_tokens))
