"""Handlers of gRPC's asyncio servers, with something else put in their place or before them."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc

_KINDS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def behaviour_of(handler: grpc.RpcMethodHandler) -> Any:
    """The function behind a handler."""
    return getattr(handler, _kind(handler)[0])


def with_behaviour(
    handler: grpc.RpcMethodHandler,
    behaviour: Any,
    deserializer: Callable[[bytes], Any] | None = None,
    serializer: Callable[[Any], bytes] | None = None,
) -> grpc.RpcMethodHandler:
    """A handler of the same kind with another function, and its own way with bytes unless another is given."""
    make = _kind(handler)[1]
    return make(behaviour, deserializer or handler.request_deserializer, serializer or handler.response_serializer)


def checked_first(
    handler: grpc.RpcMethodHandler, check: Callable[[grpc.aio.ServicerContext], Awaitable[None]]
) -> grpc.RpcMethodHandler:
    """The same handler behind a check, which ends the call by `context.abort`."""
    behaviour = behaviour_of(handler)

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await check(context)
        return await behaviour(request, context)

    async def answers(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await check(context)
        async for answer in behaviour(request, context):
            yield answer

    # gRPC looks at what kind of function it is given.
    return with_behaviour(handler, answers if inspect.isasyncgenfunction(behaviour) else call)


def within(
    handler: grpc.RpcMethodHandler, enter: Callable[[grpc.aio.ServicerContext], AbstractContextManager[object]]
) -> grpc.RpcMethodHandler:
    """The same handler, each call of it inside a context manager of its own."""
    behaviour = behaviour_of(handler)

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        with enter(context):
            return await behaviour(request, context)

    async def answers(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        with enter(context):
            async for answer in behaviour(request, context):
                yield answer

    return with_behaviour(handler, answers if inspect.isasyncgenfunction(behaviour) else call)


def _kind(handler: grpc.RpcMethodHandler) -> Any:
    return _KINDS[(handler.request_streaming, handler.response_streaming)]
