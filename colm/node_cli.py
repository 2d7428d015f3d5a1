"""What the two nodes' own commands share: security from files, and running until told to stop."""

import asyncio
import logging
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Protocol

import typer

from colm.errors import ColmError, ConfigError
from colm.wire.security import Security, Tls, read_token

TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token that callers must show; none leaves the node open."),
]
TlsDir = Annotated[Path | None, typer.Option(help="Directory with ca.pem, cert.pem and key.pem; none is plaintext.")]


class Node(Protocol):
    """A prefill or decode node."""

    address: str

    async def start(self) -> None:
        """Load and listen."""

    async def serve(self) -> None:
        """Wait until stopped."""

    async def stop(self) -> None:
        """Drain and close."""


def read_security(token_file: Path | None, tls_dir: Path | None) -> Security:
    """Security of a node that is started by hand.

    Raises:
        ConfigError: a file cannot be read, or holds no token.
    """
    try:
        token = read_token(token_file) if token_file else None
        tls = None
        if tls_dir:
            ca, cert, key = ((tls_dir / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem"))
            tls = Tls(ca_pem=ca, cert_pem=cert, key_pem=key)
    except OSError as err:
        raise ConfigError(f"cannot read {err.filename}: {err.strerror}") from err
    return Security(token=token, tls=tls)


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


def guarded(run: Coroutine[object, object, None]) -> None:
    """Run a command to its end; a user's error becomes one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        asyncio.run(run)
    except (ColmError, OSError, ValueError) as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(1) from err
