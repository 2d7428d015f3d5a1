"""Calls that are part of the trace that their caller names."""

from collections.abc import Awaitable, Callable

import grpc

from colm import tracing
from colm.wire.handlers import within


class TraceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped here
    """Lets what a call records be a child of its caller's span."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The call's own handler, inside the trace."""
        handler = await continuation(handler_call_details)
        headers = dict(handler_call_details.invocation_metadata)
        if handler is None or "traceparent" not in headers:
            return handler
        return within(handler, lambda _: tracing.continued(headers.items()))
