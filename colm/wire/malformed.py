"""Bytes that are no message of a call: the caller's fault, or damage on the way; gRPC reports them as the server's."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from colm.errors import InvalidRequest
from colm.wire.handlers import behaviour_of, with_behaviour
from colm.wire.seal import SEALS, Unreadable, opening, readable, sealing
from colm.wire.status import abort


class MalformedInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped here
    """Answers INVALID_ARGUMENT to bytes that are no message; gRPC itself answers INTERNAL.

    Where the caller seals its messages, so that damage on the way is told from that, UNAVAILABLE; see `colm.wire.seal`.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The call's own handler, whose requests are looked at before it sees them."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        return _guarded(handler, is_sealed=SEALS in map(tuple, handler_call_details.invocation_metadata))


def _guarded(handler: grpc.RpcMethodHandler, *, is_sealed: bool) -> grpc.RpcMethodHandler:
    read = opening(handler.request_deserializer, lambda: is_sealed)

    def deserialize(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return Unreadable(InvalidRequest("message", None, "the bytes are not a message of this call"))

    behaviour = behaviour_of(handler)
    checked = (_checked_stream if handler.request_streaming else _checked_message)(behaviour)
    if checked is behaviour:
        return handler
    # Bytes that a handler makes itself, tiles, have checksums of their own.
    serialize = sealing(handler.response_serializer) if is_sealed and handler.response_serializer else None
    return with_behaviour(handler, checked, deserialize, serialize)


def _checked_message(behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, Unreadable):
            await abort(context, request.error)
        return await behaviour(request, context)

    return call if asyncio.iscoroutinefunction(behaviour) else behaviour


def _checked_stream(behaviour: Any) -> Any:
    async def call(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
        return await behaviour(_messages(requests), context)

    async def answers(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async for answer in behaviour(_messages(requests), context):
            yield answer

    # gRPC looks at what kind of function it is given.
    if inspect.isasyncgenfunction(behaviour):
        return answers
    return call if asyncio.iscoroutinefunction(behaviour) else behaviour


async def _messages(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield readable(request)
