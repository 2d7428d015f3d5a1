"""The end of a blocking call of gRPC's, for whoever reads its messages."""

import logging
import threading
from typing import Any

import grpc
from grpc._cython.cygrpc import OperationType

logger = logging.getLogger(__name__)

_LOST_AFTER_S = 10.0
"""What gRPC has to say of a call comes within milliseconds of its status."""


class _Due(set[Any]):
    """What gRPC waits for, of which an event that comes after all is no error: it would end the channel's thread."""

    remove = set.discard


def hear_end(call: grpc.Call) -> None:
    """Let a reader of a call's messages hear its end even where gRPC loses the event that its reading is over.

    Seen in grpcio 1.85.1: of a call whose connection was refused the status came, and nothing else ever did. Then
    `next(call)` waits for ever, and cancelling does nothing. So its reading is taken for over some seconds later.
    """
    state: Any = call._state  # noqa: SLF001 - nothing public wakes a reader

    def is_reading() -> bool:
        return OperationType.receive_message in state.due

    def end() -> None:
        with state.condition:
            if is_reading():
                logger.warning("call.end_lost status=%s details=%s", state.code, state.details)
                state.due = _Due(state.due - {OperationType.receive_message})
                state.condition.notify_all()

    def look() -> None:
        with state.condition:
            waits = is_reading()
        if waits:
            timer = threading.Timer(_LOST_AFTER_S, end)
            timer.daemon = True
            timer.start()

    call.add_callback(look)
