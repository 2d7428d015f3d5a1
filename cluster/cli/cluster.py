"""colm up, status, down, demo: the life of a cluster. Ray is imported only when one of them runs."""

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from cluster.cli.output import DEFAULT_STATE_DIR, JsonFlag, StateDir, human_bytes, interruptible, note, print_json
from cluster.option_text import default_toml, page
from cluster.options import load_config
from cluster.serve_config import serve_config
from cluster.state import ClusterState
from colm.client import Client
from colm.nodes import NodeStatus, pool_name

_NOTHING_LEFT = "interrupted; nothing is left running"

Weights = Annotated[str | None, typer.Option(help="Weights of the decode replicas: stored, int8 or q4.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("up")(up)
    app.command("config")(config)
    app.command("status")(status)
    app.command("env")(env)
    app.command("down")(down)
    app.command("demo")(demo)


def up(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file; `colm config` prints one to start from.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory.")] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill replicas.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode replicas.")] = None,
    weights: Weights = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway; 0 picks a free one.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    secrets: Annotated[
        Path | None, typer.Option(help="With --ray-address: folder of `colm secrets`, on every machine.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Your own certificate for clients, with those that lead to its authority; PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    ca_certificate: Annotated[
        Path | None, typer.Option(help="Your own authority, which signs the nodes' certificates; PEM.")
    ] = None,
    ca_key: Annotated[Path | None, typer.Option(help="Its private key, which stays where it is.")] = None,
    insecure_ray: Annotated[
        bool | None, typer.Option("--insecure-ray", help="Insecure: join a Ray that demands no token.")
    ] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    json: JsonFlag = False,
) -> None:
    """Start or join Ray and bring up the prefill pool, the decode pool and the gateway.

    Of a cluster that is up, it changes the options that differ: replicas are replaced one after another, and answers go
    on. Another model comes up beside the running one and takes its place. Security and addresses stay as they are.
    """
    overrides = {
        "model.path": model,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "decode.weights": weights,
        "gateway.port": port,
        "ray.address": ray_address,
        "ray.insecure": insecure_ray,
        "security.folder": secrets,
        "security.ca_certificate": ca_certificate,
        "security.ca_key": ca_key,
        "gateway.tls_certificate": tls_certificate,
        "gateway.tls_key": tls_key,
    }
    with interruptible(_NOTHING_LEFT):
        from cluster.lifecycle import up as bring_up

        state = bring_up(load_config(config_file, overrides), state_dir, note)
    note(f"up: gateway at {state.gateway_address}, for OpenAI's clients at {state.base_url}")
    note("next: colm submit FILE --prompt TEXT")
    if json:
        print_json(
            {
                "gateway_address": state.gateway_address,
                "base_url": state.base_url,
                "ray_address": state.ray_address,
            }
        )


def config(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="With --serve: the TOML file whose options are deployed.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="As a config of Ray Serve, which deploys what `colm up` does.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page to read: docs/options.md.")] = False,
) -> None:
    """Print every option with its meaning and its default, as a file to start from."""
    if serve:
        typer.echo(serve_config(load_config(config_file, {})), nl=False)
    else:
        typer.echo(page() if markdown else default_toml(), nl=False)


def status(state_dir: StateDir = DEFAULT_STATE_DIR, json: JsonFlag = False) -> None:
    """Show models, roles, addresses and load."""
    state = ClusterState.require(state_dir)
    with Client(state.gateway_address, state.security) as client:
        answer = client.cluster_status()
    if json:
        print_json(
            {
                "gateway_address": state.gateway_address,
                "base_url": state.base_url,
                "ray_address": state.ray_address,
                "metrics_address": answer.metrics_address,
                "num_active_requests": answer.num_active_requests,
                "models": [asdict(model) for model in answer.models],
                "nodes": [_flat(node) for node in answer.nodes],
                "pools": [asdict(pool) | {"role": pool.role.value} for pool in answer.pools],
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
        f"gateway {state.gateway_address} and {state.base_url}, {answer.num_active_requests} requests; "
        f"Ray {state.ray_address}",
        soft_wrap=True,
    )
    if answer.metrics_address:
        console.print(
            f"metrics http://{answer.metrics_address}/metrics, of all processes by http://{answer.metrics_address}/targets",
            soft_wrap=True,
        )
    for pool in answer.pools:
        console.print(
            f"{pool.name}: {pool.num_present} of {pool.num_wanted} replicas wanted, {pool.min_replicas} to "
            f"{pool.max_replicas} allowed; the load asks for {pool.demand:.2f}",
            soft_wrap=True,
        )
    table = Table(
        Column("role", no_wrap=True), Column("address", no_wrap=True), "pid", "active", "queued", "KV pages", "memory"
    )
    for node in answer.nodes:
        report = node.report
        table.add_row(
            pool_name(report.role, report.variant),
            report.address,
            str(report.process.pid),
            str(report.num_active_requests),
            str(report.num_queued_requests),
            f"{report.num_pages_used} / {report.num_pages_total}" if report.num_pages_total else "-",
            human_bytes(report.process.resident_bytes),
        )
    console.print(table)


def _flat(node: NodeStatus) -> dict[str, object]:
    facts: dict[str, object] = asdict(node.report)
    process = asdict(node.report.process)
    del facts["process"], facts["load"]
    return facts | process | {"role": node.report.role.value, "age_s": round(node.age_s, 2)}


def env(state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Print what points OpenAI's clients at this cluster: `eval "$(colm env)"`.

    SSL_CERT_FILE makes this cluster's authority the only one that programs of that shell trust; a gateway with a
    certificate from elsewhere needs none.
    """
    state = ClusterState.require(state_dir)
    variables = {"OPENAI_BASE_URL": state.base_url, "OPENAI_API_KEY": state.client_token or "none"}
    if state.ca_file is not None and state.own_certificate is None:
        variables["SSL_CERT_FILE"] = state.ca_file
    for name, value in variables.items():
        typer.echo(f"export {name}={quote(value)}")


def down(state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Stop the cluster; nothing is left running."""
    with interruptible("interrupted; run `colm down` once more"):
        from cluster.teardown import down as bring_down

        was_up = bring_down(state_dir, note)
    note("down" if was_up else f"no cluster is up (looked in {state_dir})")


def demo(
    model: Annotated[Path, typer.Option(help="Checkpoint directory of an instruct model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 160,
    weights: Weights = None,
) -> None:
    """Bring up a cluster, read a chapter of the Python manual with it, ask a question, and take it down again.

    The last line of stdout is one JSON object with what was measured.
    """
    with interruptible(_NOTHING_LEFT):
        from cluster.cli.demo import run_demo

        record = run_demo(model, max_new_tokens, weights)
    print_json(record)
