"""A health service, which needs no token: so what it holds for strangers is bounded."""

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

MAX_WATCHERS = 64
"""`Watch` calls at once. Each lasts as long as its caller wants."""


class BoundedHealth(health_aio.HealthServicer):  # type: ignore[misc]  # grpc_health is untyped
    """`Check` for everybody, `Watch` for some, both of services with a short name."""

    def __init__(self) -> None:
        super().__init__()
        self._num_watchers = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """Report each change of a service's health."""
        if self._num_watchers >= MAX_WATCHERS:
            message = f"{MAX_WATCHERS} calls watch this server's health already; use Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._num_watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._num_watchers -= 1
