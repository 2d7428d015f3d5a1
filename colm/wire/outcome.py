"""How a call of gRPC's asyncio API really ended."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from colm.errors import PeerUnavailable
from colm.wire.status import error_of

_T = TypeVar("_T")


class Outcome:
    """Remembers the status that the server sent.

    A request that is on its way when the server ends the call fails, and gRPC then puts INTERNAL over the status that
    has arrived (grpc/grpc#36066). Callbacks run in between, so what they see is what the server said.

    Args:
        call: just made.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self.sent: grpc.aio.AioRpcError | None = None
        """What the server said of a failed call, once it has."""
        call.add_done_callback(self._remember)

    @contextmanager
    def errors(self, peer: str) -> Iterator[None]:
        """Whatever the call fails with becomes the one typed error; `peer` is who was called, for its message.

        A cancellation passes through where it is the task's own. gRPC raises the same of itself, when it gives a call
        up or its channel is closed: no wish of the task's, and a TaskGroup would swallow it.
        """
        try:
            yield
        except grpc.aio.AioRpcError as err:
            raise error_of(err if self.sent is None else self.sent, peer) from err
        except asyncio.CancelledError as err:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            if self.sent is not None and self.sent.code() is not grpc.StatusCode.CANCELLED:
                raise error_of(self.sent, peer) from err
            raise PeerUnavailable(f"the call to {peer} was given up: it was lost, or its channel closed") from err

    def _remember(self, call: grpc.aio.Call) -> None:
        code = _result(call.code())
        if code is not grpc.StatusCode.OK:
            self.sent = grpc.aio.AioRpcError(
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
