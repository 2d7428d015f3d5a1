"""Answers with and without readers: each event once, and nothing held at the end."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from colm.errors import ColmError, PeerFailed, PeerUnavailable, UnknownAnswer
from colm.events import Event, Finished, FinishReason, PrefillProgress, Reserved, Timings, Token, Usage
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from decode_node.held_answers import HeldAnswers
from decode_node.requests import DecodeJob, Emit

FINISHED = Finished(
    reason=FinishReason.LENGTH,
    usage=Usage(
        num_prompt_tokens=1,
        num_prefill_tokens=0,
        num_decode_prompt_tokens=1,
        num_new_tokens=1,
        kv_received_bytes=0,
        kv_effective_bytes=0,
        num_kv_streams=0,
    ),
    timings=Timings(queue_s=0.0, prefill_s=0.0, first_token_s=0.0, decode_s=0.0),
)
LIMIT_S = 20.0


def token(token_id: int) -> Token:
    return Token(token_id=token_id, text="", logprob=0.0, num_chains=1)


def job(name: str = "r", made_token_ids: tuple[int, ...] = ()) -> DecodeJob:
    return DecodeJob(
        request_id=name,
        token_ids=np.array([1]),
        scale=Changing(Scale(num_chains=1, min_chains=1)),
        max_new_tokens=9,
        sampling=SamplingParams(),
        deadline=None,
        made_token_ids=made_token_ids,
    )


class Script:
    """Requests that do what the test puts in: emit an event, fail with an error, or return after `Finished`."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[Event | ColmError] = asyncio.Queue()
        self.num_running = 0

    def put(self, *steps: Event | ColmError) -> None:
        for step in steps:
            self.steps.put_nowait(step)

    async def run(self, job: DecodeJob, emit: Emit) -> None:  # noqa: ARG002
        self.num_running += 1
        try:
            while not isinstance(step := await self.steps.get(), Finished):
                if isinstance(step, ColmError):
                    raise step
                await emit(step)
            await emit(step)
        finally:
            self.num_running -= 1


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def script() -> Script:
    return Script()


@pytest.fixture
async def answers(script: Script) -> AsyncIterator[HeldAnswers]:
    answers = HeldAnswers(script, 1e6)
    yield answers
    await answers.close()
    assert (len(answers), script.num_running) == (0, 0)


async def read(events: AsyncIterator[Event], count: int = 99) -> list[Event]:
    seen = []
    async with asyncio.timeout(LIMIT_S):
        async for event in events:
            seen.append(event)
            if len(seen) == count:
                break
    return seen


async def resumed(answers: HeldAnswers, num_tokens: int, **limits: Any) -> list[Event]:
    async with answers.resume("key", num_tokens) as (_, events):
        return await read(events, **limits)


async def test_a_reader_gets_every_event_and_the_last_one_when_nothing_is_held(
    answers: HeldAnswers, script: Script
) -> None:
    story = [Reserved(num_pages=1), token(1), token(2), FINISHED]
    script.put(*story)
    async with answers.begin(job(), "key") as events:
        async for event in events:
            assert event == story.pop(0)
            assert not isinstance(event, Finished) or not script.num_running
    assert story == []
    await settle()
    assert len(answers) == 0


@pytest.mark.parametrize("num_tokens", range(4))
async def test_the_next_reader_goes_on_at_any_token(answers: HeldAnswers, script: Script, num_tokens: int) -> None:
    script.put(*map(token, range(3)))
    async with answers.begin(job(), "key") as events:
        await read(events, 2)
    await settle()
    script.put(FINISHED)
    assert await resumed(answers, num_tokens) == [*map(token, range(num_tokens, 3)), FINISHED]
    await settle()
    assert len(answers) == 0
    with pytest.raises(UnknownAnswer):
        await resumed(answers, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 5])
async def test_tokens_that_are_not_here_cannot_be_skipped_nor_sent(
    answers: HeldAnswers, script: Script, num_tokens: int
) -> None:
    """Those before were made elsewhere, those after have not been made."""
    script.put(token(1), token(2))
    async with answers.begin(job(made_token_ids=(7, 7)), "key") as events:
        assert await read(events, 2) == [token(1), token(2)]
    with pytest.raises(UnknownAnswer):
        await resumed(answers, num_tokens)
    assert await resumed(answers, 3, count=1) == [token(2)]


async def test_an_answer_without_a_key_ends_with_its_reader(answers: HeldAnswers, script: Script) -> None:
    script.put(token(1))
    async with answers.begin(job(), "") as events:
        await read(events, 1)
    await settle()
    assert (len(answers), script.num_running) == (0, 0)


@pytest.mark.parametrize("orphan_s", [0.0, 0.01])
async def test_an_answer_that_nobody_asks_for_is_let_go(script: Script, orphan_s: float) -> None:
    answers = HeldAnswers(script, orphan_s)
    script.put(token(1))
    async with answers.begin(job(), "key") as events:
        await read(events, 1)
    async with asyncio.timeout(LIMIT_S):
        while len(answers):
            await asyncio.sleep(0.005)
    assert script.num_running == 0
    assert (answers.num_without_reader, answers.counts.num_resumed) == (0, 0)
    assert answers.counts.num_orphaned == answers.counts.num_expired == (orphan_s > 0)


async def test_answers_that_are_held_and_taken_up_are_counted(answers: HeldAnswers, script: Script) -> None:
    script.put(token(1), token(2))
    async with answers.begin(job(), "key") as events:
        await read(events, 1)
        assert answers.num_without_reader == 0
    assert answers.num_without_reader == 1
    assert await resumed(answers, 1, count=1) == [token(2)]
    counts = answers.counts
    assert (counts.num_orphaned, counts.num_resumed, counts.num_expired) == (2, 1, 0)
    assert answers.num_without_reader == 1


async def test_the_end_of_an_answer_waits_for_its_reader_as_well(answers: HeldAnswers, script: Script) -> None:
    async with answers.begin(job(), "key"):
        pass
    script.put(token(1), PeerFailed("out of memory"))
    await settle()
    assert script.num_running == 0
    with pytest.raises(PeerFailed, match="out of memory"):
        await resumed(answers, 0)
    assert len(answers) == 0


async def test_of_two_readers_the_newer_one_has_the_answer(answers: HeldAnswers, script: Script) -> None:
    """A gateway may be cut off and not notice."""
    async with answers.begin(job(), "key") as events:
        older = asyncio.create_task(read(events))
        await settle()
        newer = asyncio.create_task(resumed(answers, 0))
        await settle()
        script.put(token(1), FINISHED)
        with pytest.raises(PeerUnavailable, match="another call reads this answer"):
            await older
        assert await newer == [token(1), FINISHED]


async def test_what_waits_for_a_reader_besides_tokens_is_bounded(answers: HeldAnswers, script: Script) -> None:
    script.put(Reserved(num_pages=1))
    script.put(*(PrefillProgress(num_tokens_done=done, num_tokens_total=500) for done in range(500)))
    async with answers.begin(job(), "key") as events:
        async with asyncio.timeout(LIMIT_S):
            while not script.steps.empty():
                await asyncio.sleep(0)
        assert await read(events, 2) == [
            Reserved(num_pages=1),
            PrefillProgress(num_tokens_done=499, num_tokens_total=500),
        ]


async def test_only_the_request_that_is_named_is_cancelled(answers: HeldAnswers, script: Script) -> None:
    """A gateway's word about a lost call may come after its next call to the same node."""
    async with answers.begin(job("r"), "key"):
        pass
    async with answers.begin(job("r-1"), "key") as events:
        await settle()
        assert script.num_running == 1, "the older request of that key has ended"
        answers.cancel("key", "r")
        script.put(token(1))
        assert await read(events, 1) == [token(1)]
        answers.cancel("key", "r-1")
        with pytest.raises(PeerUnavailable, match="cancelled"):
            await read(events)
