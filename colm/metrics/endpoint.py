"""The HTTP port at which Prometheus reads a process's metrics."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from colm.errors import ConfigError
from colm.wire.endpoint import dial_address

MAX_CONNECTIONS = 32
"""At once; the next is answered with 503."""
_IDLE_S = 5
_STOP_S = 1

Targets = Callable[[], list[dict[str, object]]]
"""Where the processes of a cluster are read, as Prometheus' `http_sd_configs` takes it."""


class _Server(uvicorn.Server):
    """Signals belong to whoever runs the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class MetricsEndpoint:
    """Serves `/metrics`, and `/targets` where somebody knows them. Lives on one event loop; `start` it, then `stop` it.

    Numbers are all there is to read: no text, no token ids, no client's name. There is no token either, so the address
    should be the loopback's, or one that only the operators' machines reach.
    """

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int, targets: Targets | None = None) -> None:

        async def show_metrics(_: Request) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        routes = [Route("/metrics", show_metrics)]
        if targets is not None:

            async def show_targets(_: Request) -> Response:
                return JSONResponse(targets())

            routes.append(Route("/targets", show_targets))
        self._host, self._port = host, port
        self._server = _Server(
            uvicorn.Config(
                Starlette(routes=routes),
                log_config=None,
                access_log=False,
                lifespan="off",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=_STOP_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the port is taken, or the host is not this machine's.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, self._port))
            listener.listen()
        except OSError as err:
            listener.close()
            raise ConfigError(
                f"metrics cannot be served at metrics.host={self._host!r}, port {self._port}: {err.strerror}; choose "
                "another metrics.port, 0 for a free one"
            ) from err
        self.address = dial_address(self._host, listener.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve([listener]), name="metrics")

    async def stop(self) -> None:
        """Close the port."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving
