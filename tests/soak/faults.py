"""Faults of single requests: what a client or its connection does to a call."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from cluster.state import ClusterState
from colm.client import Client
from colm.events import Event
from tests.relay import ByteFault, Mishap, Relay
from tests.soak.questions import End, Outcome, Question

Fault = Callable[[random.Random, Question, Client], Outcome]


def cancel(draw: random.Random, question: Question, client: Client) -> Outcome:
    """Close the call after some events."""
    num_events, events = draw.randint(1, 6), question.ask(client)
    was_cut = False

    def some() -> Iterator[Event]:
        nonlocal was_cut
        for number, event in enumerate(events, start=1):
            yield event
            if number == num_events:
                was_cut = True
                break

    try:
        outcome = question.judge(some())
    finally:
        events.close()  # type: ignore[attr-defined]
    return Outcome(End.CANCELLED) if was_cut and outcome.end in (End.LOST, End.RIGHT) else outcome


def run_out_of_time(draw: random.Random, question: Question, client: Client) -> Outcome:
    """Have a deadline that may come at any moment."""
    return question.judge(question.ask(client, timeout_s=draw.uniform(0.01, 1.0)))


def read_slowly(draw: random.Random, question: Question, client: Client) -> Outcome:
    """Pause after some events."""
    pauses = {draw.randint(1, 8) for _ in range(2)}

    def slowly() -> Iterator[Event]:
        for number, event in enumerate(question.ask(client), start=1):
            yield event
            if number in pauses:
                time.sleep(1.0)

    return question.judge(slowly())


def ask_for_nothing(_: random.Random, question: Question, client: Client) -> Outcome:
    """Be refused by name."""
    return question.judge(question.ask(client, max_new_tokens=0))


class Lines:
    """Connections to the gateway that break at a place; each has a relay of its own."""

    def __init__(self, state: ClusterState, events: asyncio.AbstractEventLoop) -> None:
        self._state = state
        self._events = events

    def break_off(self, draw: random.Random, question: Question, _: Client) -> Outcome:
        """Lose the connection after some bytes."""
        relay = Relay(self._state.gateway_address)
        relay.fault = ByteFault(
            mishap=draw.choice([Mishap.BREAK, Mishap.TRUNCATE, Mishap.FLIP]),
            at_byte=draw.randrange(8000),
            is_from_server=draw.random() < 0.5,
        )
        self._run(relay.start())
        try:
            with Client(relay.address, self._state.security) as client:
                return question.judge(question.ask(client))
        finally:
            self._run(relay.vanish())

    def _run(self, work: Any) -> None:
        done: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._events)
        done.result(60)


@contextmanager
def lines(state: ClusterState) -> Iterator[Lines]:
    """Relays run in a thread of their own during the block."""
    events = asyncio.new_event_loop()
    thread = threading.Thread(target=events.run_forever, name="relays", daemon=True)
    thread.start()
    try:
        yield Lines(state, events)
    finally:
        events.call_soon_threadsafe(events.stop)
        thread.join()
        events.close()
