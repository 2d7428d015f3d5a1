"""Sends requests when they are due, however slow the answers are, and notes what becomes of each."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import pairwise
from time import perf_counter
from typing import Protocol

from bench.serving.outcome import Answered, Outcome
from bench.serving.trace import Asked
from colm.client import AsyncClient
from colm.errors import CapacityExceeded, ColmError, DeadlineExceeded
from colm.events import Event, Finished, Token
from colm.generation import AsyncGeneration
from colm.sampling import SamplingParams
from colm.wire.security import Security

LEAD_S = 0.2
"""From now to the beginning of the window, for the connection."""

Clock = Callable[[], float]


class Generate(Protocol):
    """Sends one request: `colm.client.AsyncClient.generate`."""

    def __call__(self, asked: Asked, /) -> AsyncGeneration | AsyncGenerator[Event]:
        """The request's events."""


async def run_trace(
    address: str, security: Security, asked: Sequence[Asked], *, timeout_s: float, ended: Callable[[], None]
) -> list[Answered]:
    """Send all requests through one client.

    Args:
        address: of the system's gRPC server.
        security: of its clients.
        asked: by time of arrival.
        timeout_s: after which an answer is worthless.
        ended: called as each one ends.

    Returns:
        One outcome for each request, in the order of arrival.
    """
    async with AsyncClient(address, security) as client:

        def generate(each: Asked, /) -> AsyncGeneration:
            return client.generate(
                token_ids=each.token_ids_N,
                max_new_tokens=each.max_new_tokens,
                sampling=SamplingParams(ignore_eos=True),
                timeout_s=timeout_s,
            )

        return await send_all(generate, asked, ended)


async def send_all(generate: Generate, asked: Sequence[Asked], ended: Callable[[], None]) -> list[Answered]:
    """As `run_trace`, through any client."""
    began_s = perf_counter() + LEAD_S

    async def one(each: Asked) -> Answered:
        await asyncio.sleep(began_s + each.at_s - perf_counter())
        answered = await answer(generate, each, began_s)
        ended()
        return answered

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(each)) for each in asked]
    return [task.result() for task in tasks]


async def answer(generate: Generate, asked: Asked, began_s: float, clock: Clock = perf_counter) -> Answered:
    """Send a request now, and read its answer.

    Times count from when it was to be sent: were they counted from when it was, a client that is late because the
    system is slow would leave out just the waiting.

    Args:
        generate: sends it.
        asked: the request.
        began_s: the window's beginning, on the clock.
        clock: in seconds.
    """
    due_s = began_s + asked.at_s
    late_s = max(0.0, clock() - due_s)
    times_s: list[float] = []
    outcome: Outcome = "failed"
    error, queue_s = "the events ended without the last one", None
    try:
        async with aclosing(generate(asked)) as events:
            async for event in events:
                if isinstance(event, Token):
                    times_s.append(clock() - due_s)
                elif isinstance(event, Finished):
                    outcome, error, queue_s = "finished", "", event.timings.queue_s
    except ColmError as err:
        outcome = "failed"
        if isinstance(err, CapacityExceeded):
            outcome = "refused"
        elif isinstance(err, DeadlineExceeded):
            outcome = "late"
        error, queue_s = f"{type(err).__name__}: {err}", None
    gaps_s = [later - earlier for earlier, later in pairwise(times_s)]
    return Answered(
        at_s=round(asked.at_s, 5),
        sent_late_s=round(late_s, 5),
        num_prompt_tokens=len(asked.token_ids_N),
        prefix=asked.prefix,
        max_new_tokens=asked.max_new_tokens,
        num_new_tokens=len(times_s),
        outcome=outcome,
        error=error,
        ttft_s=round(times_s[0], 5) if times_s else None,
        tpot_s=round(sum(gaps_s) / len(gaps_s), 5) if gaps_s else None,
        longest_gap_s=round(max(gaps_s), 5) if gaps_s else None,
        total_s=round(clock() - due_s, 5),
        queue_s=None if queue_s is None else round(queue_s, 5),
    )
