"""How a call of gRPC's asyncio API really ended."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from colm.wire.status import error_of

_T = TypeVar("_T")


_LOCAL_DETAILS = "Internal error from Core"


class Outcome:
    """The status that the server sent, even where gRPC reports another.

    If a request is being sent when a call ends, sending fails and gRPC overwrites the status that has arrived with an
    INTERNAL of its own (grpc/grpc#36066). Done callbacks run before that and see the server's status. If sending fails
    before a status arrives, either the call's deadline has passed or the peer is gone.

    Args:
        call: a call that was just made.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._call = call
        self._sent: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._remember)

    @contextmanager
    def statuses(self) -> Iterator[None]:
        """Whatever the call fails with becomes an `AioRpcError` with the status to believe.

        A cancellation passes through where it is the task's own. gRPC raises the same of itself, when it gives a call
        up or its channel is closed: no wish of the task's, and a TaskGroup would swallow it.
        """
        try:
            yield
        except grpc.aio.AioRpcError as err:
            if self._sent is not None:
                raise self._sent from err
            if _is_local(err.code(), err.details()):
                raise self._unsaid("a message was on its way as the call ended") from err
            raise
        except asyncio.CancelledError as err:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            if self._sent is not None and self._sent.code() is not grpc.StatusCode.CANCELLED:
                raise self._sent from err
            raise self._unsaid("the call was given up: it was lost, or its channel closed") from err

    @contextmanager
    def errors(self, peer: str) -> Iterator[None]:
        """As `statuses`, but the one typed error; `peer` is who was called, for its message."""
        try:
            with self.statuses():
                yield
        except grpc.aio.AioRpcError as err:
            raise error_of(err, peer) from err

    def _unsaid(self, details: str) -> grpc.aio.AioRpcError:
        """The status of a call that ended without the server's word: its deadline, or else the peer has gone."""
        remaining_s = self._call.time_remaining()
        is_over = remaining_s is not None and remaining_s <= 0
        code = grpc.StatusCode.DEADLINE_EXCEEDED if is_over else grpc.StatusCode.UNAVAILABLE
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)

    def _remember(self, call: grpc.aio.Call) -> None:
        code, details = _result(call.code()), _result(call.details())
        if code is not grpc.StatusCode.OK and not _is_local(code, details):
            self._sent = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), _result(call.trailing_metadata()), details)


def _is_local(code: grpc.StatusCode, details: str | None) -> bool:
    """Whether gRPC made up this status on the client's side."""
    return code is grpc.StatusCode.INTERNAL and details == _LOCAL_DETAILS


def _result(known: Awaitable[_T]) -> _T:
    """The result of an awaitable that is ready at once."""
    try:
        known.__await__().send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    raise AssertionError("a call that has ended knows its status")
