"""Bytes that are no message of a call: the caller's fault, which gRPC reports as the server's."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from colm.errors import InvalidRequest
from colm.wire.handlers import behaviour_of, with_behaviour
from colm.wire.status import abort


class _Malformed:
    """Stands for a message that could not be read."""


_MALFORMED = _Malformed()


class MalformedInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped here
    """Answers INVALID_ARGUMENT to bytes that are no message; gRPC itself answers INTERNAL."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The call's own handler, whose requests are looked at before it sees them."""
        handler = await continuation(handler_call_details)
        return handler if handler is None or handler.request_deserializer is None else _guarded(handler)


def _guarded(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    def deserialize(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError:
            return _MALFORMED

    behaviour = behaviour_of(handler)
    checked = (_checked_stream if handler.request_streaming else _checked_message)(behaviour)
    return handler if checked is behaviour else with_behaviour(handler, checked, deserialize)


def _checked_message(behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if request is _MALFORMED:
            await _refuse(context)
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
        if request is _MALFORMED:
            raise _error()
        yield request


async def _refuse(context: grpc.aio.ServicerContext) -> NoReturn:
    await abort(context, _error())


def _error() -> InvalidRequest:
    return InvalidRequest("message", None, "the bytes are not a message of this call")
