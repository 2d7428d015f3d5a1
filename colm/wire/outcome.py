"""How a call of gRPC's asyncio API really ended."""

from collections.abc import Awaitable
from typing import TypeVar

import grpc

_T = TypeVar("_T")


class Outcome:
    """Remembers the status that the server sent.

    A request that is on its way when the server ends the call fails, and gRPC then puts INTERNAL over the status that
    has arrived (grpc/grpc#36066). Callbacks run in between, so what they see is what the server said.

    Args:
        call: just made.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._sent: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._remember)

    def error(self, raised: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """What to believe where the call raised that."""
        return raised if self._sent is None else self._sent

    def _remember(self, call: grpc.aio.Call) -> None:
        code = _result(call.code())
        if code is not grpc.StatusCode.OK:
            self._sent = grpc.aio.AioRpcError(
                code, grpc.aio.Metadata(), _result(call.trailing_metadata()), _result(call.details())
            )


def _result(known: Awaitable[_T]) -> _T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        known.__await__().send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    raise AssertionError("a call that has ended knows its status")
