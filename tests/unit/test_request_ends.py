"""How a request ends at the front door, whatever it waits for: deadlines, cancelled and slow readers."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest

from cluster.front_door.prompt import PromptPart
from colm.errors import DeadlineExceeded
from colm.events import Accepted, Event, Token
from colm.request import GenerateRequest
from tests.gates import LIMIT_S
from tests.scripted_nodes import (
    ANSWER,
    FINISHED,
    IDS,
    TOKEN,
    Pool,
    Scripted,
    ask,
    assert_nothing_held,
    door,
    generate,
    prompt_of,
)


def waiting(where: str, never: asyncio.Event) -> tuple[Scripted, Callable[..., AsyncIterator[PromptPart]]]:
    async def stuck() -> AsyncIterator[PromptPart]:
        await never.wait()
        yield IDS

    calls = Scripted([*ANSWER[:3], never] if where == "node" else ANSWER)
    return calls, stuck if where == "upload" else prompt_of


@pytest.mark.parametrize("where", ["upload", "node", "reader"])
async def test_the_deadline_ends_whatever_is_waited_for(where: str) -> None:
    """Bug: a reader that took no more events kept its place and its decode node for ever."""
    never = asyncio.Event()
    calls, prompt = waiting(where, never)
    front_door = door(calls, pool := Pool())
    parts = prompt() if where == "upload" else prompt(IDS)

    async def read() -> None:
        async with asyncio.timeout(LIMIT_S), front_door.generate(GenerateRequest(timeout_s=0.1), parts) as events:
            async for _ in events:
                if where == "reader":
                    await never.wait()

    with pytest.raises(DeadlineExceeded, match=r"timeout_s=0\.1 is over"):
        await read()
    assert_nothing_held(front_door, calls, pool)


@pytest.mark.parametrize("where", ["upload", "node", "reader"])
async def test_a_cancelled_reader_is_cancelled_and_leaves_nothing_behind(where: str) -> None:
    never, begun = asyncio.Event(), asyncio.Event()
    calls, prompt = waiting(where, never)
    front_door = door(calls, pool := Pool())

    async def read() -> None:
        parts = prompt() if where == "upload" else prompt(IDS)
        async with front_door.generate(GenerateRequest(), parts) as events:
            if where == "upload":
                begun.set()
            async for event in events:
                if isinstance(event, Token):
                    begun.set()
                    if where == "reader":
                        await never.wait()

    reading = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), LIMIT_S)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert_nothing_held(front_door, calls, pool)


async def test_leaving_early_ends_the_work() -> None:
    calls, pool = Scripted([*ANSWER[:3], asyncio.Event()]), Pool()
    front_door = door(calls, pool)
    async with generate(front_door) as events:
        async for event in events:
            if isinstance(event, Token):
                break
    assert_nothing_held(front_door, calls, pool)


async def test_a_timeout_of_the_readers_own_stays_one() -> None:
    front_door = door(calls := Scripted(ANSWER), pool := Pool())
    with pytest.raises(TimeoutError, match="the reader's"):
        async with generate(front_door):
            raise TimeoutError("the reader's")
    assert_nothing_held(front_door, calls, pool)


async def test_a_slow_reader_holds_the_node_up() -> None:
    """Otherwise unread events of a long answer would pile up in the gateway."""
    told: list[int] = []

    class Counting(Scripted):
        async def decode(self, *_: Any, **__: Any) -> AsyncGenerator[Event]:
            for number in range(100):
                told.append(number)
                yield TOKEN
            yield FINISHED

    async with generate(door(Counting(), Pool())) as events:
        for _ in range(3):
            await anext(events)
            for _ in range(50):
                await asyncio.sleep(0)
        assert len(told) < 6


@pytest.mark.parametrize(
    ("own_s", "caller_s", "granted_s"),
    [(30.0, 20.0, 20.0), (30.0, None, 30.0), (None, 5.0, 5.0), (30.0, 5000.0, 30.0), (None, 5000.0, 1000.0)],
)
async def test_the_deadline_is_the_nearer_of_the_requests_and_its_callers(
    own_s: float | None, caller_s: float | None, granted_s: float
) -> None:
    """Bug: a deadline of gRPC's above max_timeout_s was granted."""
    calls = Scripted(ANSWER)
    accepted = (await ask(door(calls, Pool()), timeout_s=own_s, caller_waits_s=caller_s))[0]
    assert isinstance(accepted, Accepted)
    assert accepted.timeout_s == granted_s
    assert granted_s - LIMIT_S < calls.deadlines[0].remaining_s() <= granted_s


async def test_a_deadline_that_is_past_is_refused() -> None:
    with pytest.raises(DeadlineExceeded, match="past already"):
        await ask(door(Scripted(ANSWER), Pool()), timeout_s=0.0)
