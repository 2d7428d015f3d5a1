"""colm token create, list, revoke: the clients of a gateway, without a restart."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.output import DEFAULT_STATE_DIR, JsonFlag, StateDir, note, print_json

Name = Annotated[str, typer.Argument(help="The client's name, as the audit log writes it.")]
Secrets = Annotated[
    Path | None, typer.Option(help="Folder of `colm secrets`, for a cluster of several machines: the gateway's copy.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    tokens = typer.Typer(help="Tokens of clients: make, list and revoke them.", no_args_is_help=True)
    tokens.command("create")(create)
    tokens.command("list")(list_tokens)
    tokens.command("revoke")(revoke)
    app.add_typer(tokens, name="token")


def create(
    name: Name,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    max_queued_tokens: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of its requests at once.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Bytes of its requests' documents at once.")] = None,
    max_tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and new tokens a minute.")] = None,
    max_files_bytes: Annotated[int | None, typer.Option(min=1, help="Bytes of its files that are kept.")] = None,
    secrets: Secrets = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    json: JsonFlag = False,
) -> None:
    """Make a token for a client and print it, this one time. It is valid at once, and after restarts."""
    from cluster.client_tokens import TokenLimits, create_token

    limits = TokenLimits(
        max_requests=max_requests,
        max_queued_tokens=max_queued_tokens,
        max_bytes=max_bytes,
        max_tokens_per_minute=max_tokens_per_minute,
        max_files_bytes=max_files_bytes,
    )
    token = create_token(_path(secrets, state_dir), name, limits)
    if json:
        print_json({"name": name, "token": token, "limits": limits.model_dump()})
    else:
        typer.echo(token)
        note("only its digest is kept: give it to the client now, as the file of `colm submit --token-file`")


def list_tokens(secrets: Secrets = None, state_dir: StateDir = DEFAULT_STATE_DIR, json: JsonFlag = False) -> None:
    """Show the clients and their limits; their tokens are not kept."""
    from cluster.client_tokens import TokenLimits, read_clients

    clients = read_clients(_path(secrets, state_dir))
    if json:
        print_json({"clients": [{"name": client.name, "limits": client.limits.model_dump()} for client in clients]})
        return
    names = list(TokenLimits.model_fields)
    table = Table("client", *(name.removeprefix("max_").replace("_", " ") for name in names))
    for client in clients:
        limits = client.limits.model_dump()
        table.add_row(client.name, *("-" if limits[name] is None else f"{limits[name]:,}" for name in names))
    Console().print(table)


def revoke(name: Name, secrets: Secrets = None, state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Refuse a client's token from its next call on, and end its running calls about a second later."""
    from cluster.client_tokens import revoke_token

    revoke_token(_path(secrets, state_dir), name)
    note(f"revoked {name}")


def _path(secrets: Path | None, state_dir: Path) -> Path:
    from cluster.client_tokens import TOKENS_FILE
    from cluster.state import make_state_dir

    if secrets is not None:
        return secrets / TOKENS_FILE
    make_state_dir(state_dir)
    return state_dir / TOKENS_FILE
