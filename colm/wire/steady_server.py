"""gRPC's asyncio server, which no caller can end by the name of a method.

It leans on what gRPC keeps to itself, of the one version that is pinned; a test shows whether another one still fits.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio._server import Server


class _Core(cygrpc.AioServer):  # type: ignore[misc]  # grpc is untyped here
    """Takes calls of its own methods alone, whose names gRPC's core has compared as bytes.

    Of any other call gRPC decodes the name in the loop that takes all calls: one that is not UTF-8 ends that loop, and
    with it the server and every running call, for a caller without a token.
    """

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        for handler in handlers:
            self.add_registered_method_handlers(handler._method_handlers)  # noqa: SLF001

    def _make_request_call_future(self, method: bytes | None) -> Any:
        if method is not None:
            return super()._make_request_call_future(method)
        return asyncio.get_running_loop().create_task(self._refuse_others())

    async def _refuse_others(self) -> None:
        """Answer UNIMPLEMENTED to calls of unknown methods, until the server stops."""
        loop, refusals = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        nothing = cygrpc._MethodResolver([], {})  # noqa: SLF001
        while True:
            call = await self._request_call()
            refusing = cygrpc._handle_rpc("", nothing, (), call, loop, False)  # noqa: SLF001
            task = loop.create_task(cygrpc._schedule_rpc_coro(refusing, call, loop, ""))  # noqa: SLF001
            refusals.add(task)
            task.add_done_callback(refusals.discard)


class SteadyServer(Server):  # type: ignore[misc]  # grpc is untyped here
    """See `_Core`.

    Args:
        interceptors: as gRPC's.
        options: as gRPC's.
    """

    def __init__(
        self, interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, object]]
    ) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _Core(self._loop, None, (), tuple(interceptors), tuple(options), None)
