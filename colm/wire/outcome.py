"""How a call of gRPC's asyncio API really ended."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from colm.errors import PeerUnavailable
from colm.wire.status import error_of

_T = TypeVar("_T")


_LOCAL_DETAILS = "Internal error from Core"


class Outcome:
    """The status that the server sent, whatever gRPC makes of it here.

    A request that is on its way when a call ends fails, and gRPC then puts an INTERNAL of its own over the status that
    has arrived (grpc/grpc#36066). Callbacks run in between, so what they see is what the server said. Where the
    failure comes first, the call's own deadline is the reason, or the peer has gone.

    Args:
        call: just made.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._call = call
        self._sent: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._remember)

    def status(self, raised: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """What to believe where the call raised that."""
        if self._sent is not None:
            return self._sent
        if not _is_local(raised.code(), raised.details()):
            return raised
        remaining_s = self._call.time_remaining()
        is_over = remaining_s is not None and remaining_s <= 0
        code = grpc.StatusCode.DEADLINE_EXCEEDED if is_over else grpc.StatusCode.UNAVAILABLE
        details = "a message was on its way as the call ended"
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)

    @contextmanager
    def errors(self, peer: str) -> Iterator[None]:
        """Whatever the call fails with becomes the one typed error; `peer` is who was called, for its message.

        A cancellation passes through where it is the task's own. gRPC raises the same of itself, when it gives a call
        up or its channel is closed: no wish of the task's, and a TaskGroup would swallow it.
        """
        try:
            yield
        except grpc.aio.AioRpcError as err:
            raise error_of(self.status(err), peer) from err
        except asyncio.CancelledError as err:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            if self._sent is not None and self._sent.code() is not grpc.StatusCode.CANCELLED:
                raise error_of(self._sent, peer) from err
            raise PeerUnavailable(f"the call to {peer} was given up: it was lost, or its channel closed") from err

    def _remember(self, call: grpc.aio.Call) -> None:
        code, details = _result(call.code()), _result(call.details())
        if code is not grpc.StatusCode.OK and not _is_local(code, details):
            self._sent = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), _result(call.trailing_metadata()), details)


def _is_local(code: grpc.StatusCode, details: str | None) -> bool:
    """Whether gRPC made that status up on this side."""
    return code is grpc.StatusCode.INTERNAL and details == _LOCAL_DETAILS


def _result(known: Awaitable[_T]) -> _T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        known.__await__().send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    raise AssertionError("a call that has ended knows its status")
