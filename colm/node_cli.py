"""What the two nodes' own commands share: security from files, and running until told to stop."""

import asyncio
import inspect
import logging
import re
import signal
from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from pathlib import Path
from typing import Annotated, Literal, Protocol, get_args, get_origin

import typer
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from colm.errors import ColmError, ConfigError
from colm.settings import Settings, explain
from colm.wire.endpoint import is_loopback
from colm.wire.members import Member
from colm.wire.security import Security, read_token
from colm.wire.tls_files import of_member

TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token that callers must show; none leaves the node open."),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="0 picks a free port.")]
TlsDir = Annotated[
    Path | None,
    typer.Option(help="Folder of `colm secrets`: callers must have a certificate of its authority; none is plaintext."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Insecure: without --tls-dir, speak to other machines.")]


class Node(Protocol):
    """A prefill or decode node."""

    address: str
    metrics: CollectorRegistry

    @property
    def is_healthy(self) -> bool:
        """Whether it works, as far as it can tell."""

    async def start(self) -> None:
        """Load and listen."""

    async def serve(self) -> None:
        """Wait until stopped."""

    async def stop(self) -> None:
        """Drain and close."""


def read_security(
    token_file: Path | None, tls_dir: Path | None, member: Member, hosts: Iterable[str], *, insecure: bool
) -> Security:
    """Security of a node that is started by hand.

    Args:
        token_file: see `TokenFile`.
        tls_dir: see `TlsDir`.
        member: the node's role.
        hosts: where it listens, and whom it calls.
        insecure: plaintext may leave this machine.

    Raises:
        ConfigError: a file cannot be read, or holds no token; or plaintext would leave this machine unasked.
    """
    for host in hosts if tls_dir is None and not insecure else ():
        if not is_loopback(host):
            raise ConfigError(
                f"host {host!r} without --tls-dir: keys, values, tokens and prompts would go between machines in "
                "plaintext; give a folder of `colm secrets`, or --insecure"
            )
    try:
        token = read_token(token_file) if token_file else None
    except OSError as err:
        raise ConfigError(f"cannot read {err.filename}: {err.strerror}") from err
    return Security(token=token, tls=of_member(tls_dir, member) if tls_dir else None)


async def run_node(node: Node) -> None:
    """Start, print the address, and serve until SIGINT or SIGTERM."""
    await node.start()
    typer.echo(node.address)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    serving = asyncio.create_task(node.serve())
    await asyncio.wait([serving, asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
    await node.stop()


def command(run: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """Make a command of a coroutine function; a user's error becomes one line on stderr and exit status 1.

    A parameter that is a `Settings` becomes a flag for each of its options. Values are read by the settings themselves,
    as those of a file are.
    """
    groups: dict[str, type[Settings]] = {}
    parameters = []
    for name, parameter in inspect.signature(run).parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            groups[name] = kind
            parameters += [_flag(kind, option) for option in kind.model_fields]
        else:
            parameters.append(parameter)

    @wraps(run)
    def main(**given: object) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        try:
            asyncio.run(run(**{name: _read(kind, given) for name, kind in groups.items()}, **given))
        except (ColmError, OSError, ValueError) as err:
            typer.echo(f"error: {err}", err=True)
            raise typer.Exit(1) from err

    # What typer reads, in place of the wrapped function's.
    main.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    main.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return main


def _flag(kind: type[Settings], option: str) -> inspect.Parameter:
    field = kind.model_fields[option]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    shown = typer.Option(
        help=field.description,
        metavar="|".join(choices) or "VALUE",
        show_default=False if field.default is None else str(field.default),
    )
    name = kind.flag_prefix + option
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, shown]
    )


def _read(kind: type[Settings], given: dict[str, object]) -> Settings:
    """Take a group's options from what was given, and check them."""
    words = {option: given.pop(kind.flag_prefix + option) for option in kind.model_fields}
    try:
        return kind.model_validate({option: word for option, word in words.items() if word is not None})
    except ValidationError as err:
        raise ConfigError(explain(err, lambda option: _as_flag(kind.flag_prefix + option))) from err


def _as_flag(option: str) -> str:
    """`max_queued_s`, and whatever follows it, as `--max-queued-s`."""
    name = re.match(r"\w*", option)
    assert name is not None
    return "--" + name[0].replace("_", "-") + option[name.end() :]
