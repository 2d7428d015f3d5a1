"""HTTP servers of the nodes and the gateway, on an event loop that others use too."""

import asyncio
import contextlib
import math
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from colm.wire.endpoint import dial_address, why_not
from colm.wire.security import Tls, TlsSource

HEAD_S = 10.0
"""In which a request's head must come, from its connection or its first byte on."""
_IDLE_S = 5
_STOP_S = 2


class _Protocol(HttpToolsProtocol):
    """Closes connections on which a request's head does not come."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_ends = self.loop.call_later(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ends.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_ends.cancel()
        self._head_ends = self.loop.call_later(HEAD_S, self.transport.close)

    def on_headers_complete(self) -> None:
        self._head_ends.cancel()
        super().on_headers_complete()


class _Server(uvicorn.Server):
    """Signals belong to whoever runs the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an ASGI application. Lives on one event loop; `start` it, then `stop` it.

    Args:
        app: the application.
        tls: the server's certificates, which may be renewed; None is plaintext.
        max_connections: at once; a request on a further one is answered with 503.
        shares_port: others of this user that say so too may listen on the same port; each gets some of the connections.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        port: int,
        max_connections: int,
        tls: TlsSource | None = None,
        shares_port: bool = False,
    ) -> None:
        self._host, self._port, self._shares_port = host, port, shares_port
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=max_connections,
                timeout_keep_alive=_IDLE_S,
                ssl_context_factory=None if tls is None else lambda *_: _renewed_context(tls),
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken, or the host is not this machine's; the message says which.
        """
        if (reason := why_not(self._host, self._port, shares_port=self._shares_port)) is not None:
            raise OSError(f"cannot listen on {self._host}:{self._port}: {reason}")
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(self._shares_port))
            listener.bind((self._host, self._port))
            listener.listen()
        except OSError:
            listener.close()
            raise
        self.address = dial_address(self._host, listener.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve([listener]), name=f"http {self.address}")

    async def stop(self, grace_s: float = 0) -> None:
        """Take no more connections, and break off what has not ended within so many seconds and two more."""
        if self._serving is not None:
            self._server.config.timeout_graceful_shutdown = math.ceil(grace_s) + _STOP_S
            self._server.should_exit = True
            await self._serving


def _renewed_context(source: TlsSource) -> ssl.SSLContext:
    """A context that shows the certificates of the moment of each handshake."""
    shown = source.current()
    context = first = server_context(shown)

    def renew(connection: ssl.SSLObject, *_: object) -> None:
        nonlocal shown, context
        if (current := source.current()) is not shown:
            shown, context = current, server_context(current)
        connection.context = context

    first.sni_callback = renew  # called in every handshake, whether or not it names a server
    return first


def server_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or 1.3 with the server's certificate."""
    if tls.cert_pem is None or tls.key_pem is None:
        raise ValueError("tls.cert_pem and tls.key_pem are needed to serve")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # Python reads certificates from files alone; this one is for this user, and gone at once.
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(tls.cert_pem + b"\n" + tls.key_pem)
        context.load_cert_chain(file.name)
    return context
