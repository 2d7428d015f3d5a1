"""A front door over decode nodes that follow a script."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cluster.front_door.front_door import FrontDoor
from cluster.front_door.placement import DecodeJob, DecodeLease, DecodePool
from cluster.front_door.plan import ServedModel
from cluster.front_door.prompt import PromptPart
from colm.clock import Deadline, MonotonicClock
from colm.errors import ColmError
from colm.events import Event, Finished, FinishReason, PrefillProgress, Reserved, Timings, Token, Usage
from colm.line import Beat
from colm.request import GenerateRequest
from colm.text.tokenizer import Tokenizer
from tests.gates import LIMIT_S
from tests.gateway import LIMITS, RETRY, TakingTurns, decode_nodes
from tests.tiny import tiny_config

IDS = np.arange(5, 25)
NOW = datetime(2026, 3, 5, tzinfo=UTC)
FINISHED = Finished(
    reason=FinishReason.LENGTH,
    usage=Usage(
        num_prompt_tokens=20,
        num_prefill_tokens=19,
        num_decode_prompt_tokens=1,
        num_new_tokens=1,
        kv_received_bytes=0,
        kv_effective_bytes=0,
        num_kv_streams=1,
    ),
    timings=Timings(queue_s=0.0, prefill_s=0.0, first_token_s=0.0, decode_s=0.0),
)
TOKEN = Token(token_id=7, text="", logprob=0.0, num_chains=1)
ANSWER = (Reserved(num_pages=2), PrefillProgress(num_tokens_done=19, num_tokens_total=19), TOKEN, FINISHED)

Step = Event | ColmError | asyncio.Event
"""A call's next step: send an event, fail, or wait."""


class Scripted:
    """Decode nodes that follow one script a call; the last script serves all later calls."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self.jobs: list[DecodeJob] = []
        self.only_if_room: list[bool] = []
        self.deadlines: list[Deadline] = []
        self.num_running = 0
        self.leaves_answers = False
        self._scripts = scripts

    def leave_answers(self) -> None:
        self.leaves_answers = True

    async def decode(
        self,
        lease: DecodeLease,  # noqa: ARG002 - the pool knows what it lent
        job: DecodeJob,
        *,
        only_if_room: bool,
        deadline: Deadline,
    ) -> AsyncGenerator[Event]:
        script = self._scripts[min(len(self.jobs), len(self._scripts) - 1)]
        self.jobs.append(job)
        self.only_if_room.append(only_if_room)
        self.deadlines.append(deadline)
        self.num_running += 1
        try:
            for step in script:
                if isinstance(step, ColmError):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.num_running -= 1


class Pool(TakingTurns):
    """A pool that counts the nodes lent now."""

    def __init__(self, num_ahead: Sequence[int] = ()) -> None:
        super().__init__(["one", "two", "three"])
        self.num_lent = 0
        self._num_ahead = num_ahead

    @asynccontextmanager
    async def lease(self, *, beat: Beat, refused_by: Collection[str] = ()) -> AsyncIterator[DecodeLease]:
        for num_ahead in self._num_ahead:
            await beat(num_ahead)
        async with super().lease(beat=beat, refused_by=refused_by) as lease:
            self.num_lent += 1
            try:
                yield lease
            finally:
                self.num_lent -= 1


def door(
    calls: Scripted,
    pool: DecodePool,
    *,
    num_decode_nodes: int = 1,
    addresses: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    on_resubmit: Callable[[ColmError], None] = lambda _: None,
    **limits: Any,
) -> FrontDoor:
    return FrontDoor(
        model=ServedModel(name="tiny", config=tiny_config(), tokenizer=tokenizer, fingerprint="f", revision="r"),
        limits=replace(LIMITS, **limits),
        decode_pool=pool,
        calls=calls,
        registry=decode_nodes(num_decode_nodes, addresses),
        clock=MonotonicClock(),
        retry=RETRY,
        on_resubmit=on_resubmit,
    )


async def prompt_of(*parts: PromptPart) -> AsyncIterator[PromptPart]:
    for part in parts:
        yield part


def generate(
    front_door: FrontDoor, *parts: PromptPart, caller_waits_s: float | None = None, **options: Any
) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
    prompt = prompt_of(*(parts or (IDS,)))
    return front_door.generate(GenerateRequest(**options), prompt, caller_waits_s=caller_waits_s)


async def ask(front_door: FrontDoor, *parts: PromptPart, **options: Any) -> list[Event]:
    async with asyncio.timeout(LIMIT_S), generate(front_door, *parts, **options) as events:
        return [event async for event in events]


def assert_nothing_held(front_door: FrontDoor, calls: Scripted, pool: Pool) -> None:
    assert (front_door.status().num_active_requests, calls.num_running, pool.num_lent) == (0, 0, 0)
