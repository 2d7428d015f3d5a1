"""The HTTP port at which Prometheus reads a process's metrics, and others whether it works."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from colm.errors import ConfigError
from colm.wire.http_server import HttpServer

MAX_CONNECTIONS = 32

Targets = Callable[[], list[dict[str, object]]]
"""Where the processes of a cluster are read, as Prometheus' `http_sd_configs` takes it."""

Probe = Callable[[], bool]


class MetricsEndpoint:
    """Serves `/metrics`, `/live` and `/ready`, and `/targets` where somebody knows them.

    Lives on one event loop; `start` it, then `stop` it. `/live` answers 503 where a restart would help, `/ready` also
    where requests would wait for somebody else.

    Numbers are all there is to read: no text, no token ids; the gateway's are by client. There is no token either, so
    the address should be the loopback's, or one that only the operators' machines reach.

    Args:
        registry: what it shows.
        host: where it listens.
        port: likewise; 0 picks a free one.
        targets: what `/targets` shows; None without.
        shares_port: the process's successor may listen there before this one stops.
        is_alive: False where a restart would help.
        is_ready: False where others should be asked.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str,
        port: int,
        targets: Targets | None = None,
        shares_port: bool = False,
        is_alive: Probe = lambda: True,
        is_ready: Probe = lambda: True,
    ) -> None:
        async def show_metrics(_: Request) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        async def show_live(_: Request) -> Response:
            return _verdict(is_alive())

        async def show_ready(_: Request) -> Response:
            return _verdict(is_alive() and is_ready())

        routes = [Route("/metrics", show_metrics), Route("/live", show_live), Route("/ready", show_ready)]
        if targets is not None:

            async def show_targets(_: Request) -> Response:
                return JSONResponse(targets())

            routes.append(Route("/targets", show_targets))
        self._server = HttpServer(
            Starlette(routes=routes),
            host=host,
            port=port,
            max_connections=MAX_CONNECTIONS,
            shares_port=shares_port,
        )

    @property
    def address(self) -> str:
        """host:port, once it listens."""
        return self._server.address

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the port is taken, or the host is not this machine's.
        """
        try:
            await self._server.start()
        except OSError as err:
            raise ConfigError(f"metrics: {err}; set metrics.host or metrics.port") from err

    async def stop(self) -> None:
        """Close the port."""
        await self._server.stop()


def _verdict(is_well: bool) -> Response:
    return Response("ok\n" if is_well else "not now\n", status_code=200 if is_well else 503, media_type="text/plain")
