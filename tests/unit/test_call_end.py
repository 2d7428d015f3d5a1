"""The end of a blocking call: whoever reads it hears of it, whatever gRPC loses."""

import queue
import threading
from typing import Any

import grpc
import pytest
from grpc._channel import _MultiThreadedRendezvous, _RPCState
from grpc._cython.cygrpc import OperationType

from colm.wire import call_end
from tests.gates import LIMIT_S


class Core:
    """Takes every operation, and lets none come true."""

    def __init__(self) -> None:
        self.is_reading = threading.Event()

    def operate(self, *_: object) -> bool:
        self.is_reading.set()
        return True


def refused(state: Any) -> None:
    """What gRPC does when a call's status has come."""
    with state.condition:
        state.code, state.details = grpc.StatusCode.UNAVAILABLE, "refused"
        callbacks, state.callbacks = state.callbacks, None
        state.condition.notify_all()
    for each in callbacks:
        each()


@pytest.fixture
def reading() -> tuple[Any, "queue.Queue[BaseException]"]:
    """A call that a thread reads, and what the thread hears."""
    core, heard = Core(), queue.Queue[BaseException]()
    call: Any = _MultiThreadedRendezvous(_RPCState((), None, None, None, None), core, None, None)
    call_end.hear_end(call)

    def read() -> None:
        try:
            next(call)
        except BaseException as err:  # noqa: BLE001 - the test looks at it
            heard.put(err)

    threading.Thread(target=read, daemon=True).start()
    assert core.is_reading.wait(LIMIT_S)
    return call, heard


def test_a_reader_hears_the_status_although_the_end_of_its_reading_is_lost(
    reading: tuple[Any, "queue.Queue[BaseException]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: it waited for ever, and with it a request, its pages, or a client."""
    monkeypatch.setattr(call_end, "_LOST_AFTER_S", 0.0)
    call, heard = reading
    refused(call._state)
    error = heard.get(timeout=LIMIT_S)
    assert isinstance(error, grpc.RpcError)
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    call._state.due.remove(OperationType.receive_message)  # as gRPC does, should the event come after all


def test_what_ends_in_order_is_left_alone(
    reading: tuple[Any, "queue.Queue[BaseException]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, heard = reading
    monkeypatch.setattr(threading, "Timer", lambda *_: pytest.fail("a timer for a call that has ended"))
    with call._state.condition:
        call._state.due.remove(OperationType.receive_message)
    refused(call._state)
    assert isinstance(heard.get(timeout=LIMIT_S), grpc.RpcError)
