"""The gateway's two ports for clients, over gRPC and over HTTP. Serve's own server has neither TLS nor tokens."""

import asyncio
import logging
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.applications import Starlette

from cluster.client_requests import ClientRequests
from cluster.generation_service import GenerationService
from cluster.replicas.gateway_options import GatewayOptions
from colm import defaults
from colm.wire.endpoint import bind, create_server, dial_address
from colm.wire.health import BoundedHealth
from colm.wire.http_server import HttpServer
from colm.wire.security import Security
from colm.wire.v1 import generation_service_pb2

logger = logging.getLogger(__name__)

_SERVICE = generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


class ClientPorts:
    """Serves clients over gRPC, with health service and reflection, and over HTTP, once it is `open`.

    The gateway that takes this one's place listens on the same ports before this one stops (ADR 54). Make it on the
    event loop.

    Args:
        options: host and ports, and how many requests there may be.
        security: token and TLS that are demanded of clients.
        requests: what comes over gRPC goes there.
        app: what comes over HTTP goes there.
    """

    def __init__(self, options: GatewayOptions, security: Security, requests: ClientRequests, app: Starlette) -> None:
        self._host, self._port = options.host, options.port
        self._security = security
        self._opened = asyncio.Event()
        self._address = ""
        self._closing: asyncio.Future[Any] | None = None
        self._grpc: grpc.aio.Server = create_server(
            security, lambda token: requests.clients.of(token) is not None, shares_port=True
        )
        GenerationService(requests, upload_idle_s=options.limits.upload_idle_s).add_to(self._grpc)
        self._health = BoundedHealth()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (
            _SERVICE,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._grpc)
        self._http = HttpServer(
            app,
            host=options.host,
            port=options.http_port,
            max_connections=2 * options.limits.max_requests,
            tls=security.tls,
            shares_port=True,
        )

    @property
    def is_open(self) -> bool:
        """It has begun to listen."""
        return self._opened.is_set()

    @property
    def is_closing(self) -> bool:
        """It listens no more."""
        return self._closing is not None

    async def open(self) -> None:
        """Listen.

        Raises:
            OSError: a port is taken, or the host is not this machine's.
        """
        for name in ("", _SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        port = bind(self._grpc, self._host, self._port, self._security, shares_port=True)
        await self._grpc.start()
        await self._http.start()
        self._address = dial_address(self._host, port)
        self._opened.set()
        logger.info("gateway.ready address=%s http=%s", self._address, self._http.address)

    async def addresses(self) -> tuple[str, str]:
        """host:port where clients on this machine are served, over gRPC and over HTTP, once it listens."""
        await self._opened.wait()
        return self._address, self._http.address

    def close(self, longest_s: float) -> None:
        """Listen no more, from the next step of the loop on; what has come by then may take so long to end."""
        if self._closing is None:
            self._closing = asyncio.gather(self._grpc.stop(longest_s), self._http.stop(longest_s))

    async def say_that_it_goes(self) -> None:
        """Tell health checks, and whoever watches, that it takes nothing new."""
        await self._health.enter_graceful_shutdown()

    async def end(self) -> None:
        """Wait until all has ended that it was told to end with `close`."""
        await self._grpc.stop(defaults.STOP_GRACE_S)  # whoever watches its health has no end
        if self._closing is not None:
            await self._closing
