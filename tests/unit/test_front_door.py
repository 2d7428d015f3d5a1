"""The front door with scripted decode nodes: what is admitted, refused, told and bounded."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from cluster.front_door.prompt import PromptPart
from colm.checkpoint import TextConfig
from colm.errors import CapacityExceeded, GoingAway, InvalidRequest, UnknownModel
from colm.events import Accepted, Event, PrefillProgress, Queued, WaitsFor
from colm.request import GenerateRequest
from colm.sampling import SamplingParams
from colm.text.tokenizer import Tokenizer
from tests.gates import LIMIT_S
from tests.scripted_nodes import (
    ANSWER,
    FINISHED,
    IDS,
    NOW,
    Pool,
    Scripted,
    ask,
    assert_nothing_held,
    door,
    generate,
    prompt_of,
)
from tests.tiny import tiny_tokenizer


async def test_an_answer_is_accepted_then_relayed_without_what_concerns_the_nodes_alone() -> None:
    calls, pool = Scripted(ANSWER), Pool()
    front_door = door(calls, pool)
    accepted, *relayed = await ask(front_door, IDS[:3], IDS[3:], num_chains=2, max_new_tokens=4)
    assert isinstance(accepted, Accepted)
    assert (accepted.model, accepted.num_prompt_tokens, accepted.num_chains) == ("tiny", 20, 2)
    assert relayed == [*ANSWER[1:]]
    (job,) = calls.jobs
    assert (job.request_id, job.scale.value.num_chains, job.max_new_tokens) == (accepted.request_id, 2, 4)
    assert job.token_ids.dtype == np.int64
    assert job.token_ids.tolist() == IDS.tolist()
    assert_nothing_held(front_door, calls, pool)


async def test_a_document_in_pieces_becomes_token_ids() -> None:
    tokenizer = Tokenizer(tiny_tokenizer().to_str().encode(), TextConfig(), lambda: NOW)
    calls, document = Scripted(ANSWER), "the thing, wörtlich".encode()
    await ask(door(calls, Pool(), tokenizer=tokenizer), document[:13], document[13:], prompt=" and")
    assert calls.jobs[0].token_ids.dtype == np.int64
    assert calls.jobs[0].token_ids.tolist() == tokenizer.encode("the thing, wörtlich and").tolist()


async def test_waiting_for_a_node_is_told_as_it_happens() -> None:
    _, *events = await ask(door(Scripted(ANSWER), Pool(num_ahead=(2, 1, 0))))
    assert events[:3] == [Queued(waits_for=WaitsFor.DECODE_NODE, num_ahead=number) for number in (2, 1, 0)]


async def test_a_door_that_is_drained_takes_nobody_and_lets_those_inside_end() -> None:
    proceed = asyncio.Event()
    calls, pool = Scripted([*ANSWER[:2], proceed, *ANSWER[2:]]), Pool()
    front_door = door(calls, pool)
    async with asyncio.timeout(LIMIT_S), generate(front_door) as events:
        assert isinstance(await anext(events), Accepted)
        draining = asyncio.create_task(front_door.drain(LIMIT_S))
        await asyncio.sleep(0)
        with pytest.raises(GoingAway):
            await ask(front_door)
        proceed.set()
        assert [event async for event in events] == [*ANSWER[1:]]
        assert not draining.done()
    await draining
    assert not calls.leaves_answers
    assert_nothing_held(front_door, calls, pool)


async def test_what_has_not_ended_at_the_bound_is_told_that_the_gateway_goes() -> None:
    calls, pool = Scripted([*ANSWER[:2], asyncio.Event()]), Pool()
    front_door = door(calls, pool)

    async def read() -> None:
        async with generate(front_door) as events:
            async for event in events:
                if isinstance(event, PrefillProgress):
                    await front_door.drain(0.0)

    with pytest.raises(GoingAway, match="ask again"):
        await asyncio.wait_for(read(), LIMIT_S)
    assert calls.leaves_answers
    assert_nothing_held(front_door, calls, pool)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "huge"}, "'tiny'"),
    "num_chains": ({"num_chains": 4}, "between 1 and 3"),
    "min_chains": ({"num_chains": 2, "min_chains": 3}, "between 1 and num_chains=2"),
    "max_new_tokens": ({"max_new_tokens": 401}, "between 1 and 400"),
    "timeout_s": ({"timeout_s": 1001.0}, "at most 1000"),
    "stop": ({"sampling": SamplingParams(stop=("x",))}, "use stop_token_ids"),
    "prompt": ({"prompt": "?"}, "send token_ids"),
}


@pytest.mark.parametrize("field", REFUSALS)
async def test_an_option_that_cannot_be_served_is_named_with_its_limit(field: str) -> None:
    options, limit = REFUSALS[field]
    calls, pool = Scripted(ANSWER), Pool()
    front_door = door(calls, pool)
    with pytest.raises(InvalidRequest) as refusal:
        await ask(front_door, *([b""] if field == "prompt" else []), **options)
    assert refusal.value.field == field
    assert limit in refusal.value.limit
    assert isinstance(refusal.value, UnknownModel) == (field == "model")
    assert not pool.lent
    assert_nothing_held(front_door, calls, pool)


@pytest.mark.parametrize("worst", [320, -1])
async def test_token_ids_outside_the_vocabulary_are_refused(worst: int) -> None:
    with pytest.raises(InvalidRequest, match=f"token_ids={worst}: must be below the vocabulary size 320"):
        await ask(door(Scripted(ANSWER), Pool()), np.array([5, worst, 6]))


async def test_unseeded_answers_of_two_requests_draw_different_numbers() -> None:
    calls = Scripted(ANSWER)
    front_door = door(calls, Pool())
    for _ in range(2):
        await ask(front_door, sampling=SamplingParams(temperature=1.0))
    assert len({job.sampling.seed for job in calls.jobs}) == 2


async def test_the_requests_inside_are_bounded_and_a_place_is_free_when_its_block_ends() -> None:
    calls, pool = Scripted(ANSWER), Pool()
    front_door = door(calls, pool, max_requests=1)
    async with generate(front_door) as events:
        assert isinstance(await anext(events), Accepted)
        with pytest.raises(CapacityExceeded, match="1 requests are inside"):
            await ask(front_door)
    assert_nothing_held(front_door, calls, pool)
    assert (await ask(front_door))[-1] == FINISHED


async def test_the_uploads_of_all_requests_together_are_bounded() -> None:
    """Bug: 64 clients that sent documents of 64 MiB took 4 GiB of the gateway."""
    tokenizer = Tokenizer(tiny_tokenizer().to_str().encode(), TextConfig(), lambda: NOW)
    front_door = door(Scripted(ANSWER), Pool(), tokenizer=tokenizer, max_upload_bytes=100)
    more, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[PromptPart]:
        yield b"a" * 60
        more.set()
        await go_on.wait()
        yield b"b" * 20

    async def first() -> list[Event]:
        async with front_door.generate(GenerateRequest(), slow()) as events:
            return [event async for event in events]

    async with asyncio.timeout(LIMIT_S):
        uploading = asyncio.create_task(first())
        await more.wait()
        for parts in ((b"c" * 41,), (b"c" * 20, b"c" * 21), (IDS[:6],)):
            with pytest.raises(CapacityExceeded, match=r"gateway\.max_upload_bytes=100"):
                await ask(front_door, *parts)
        assert (await ask(front_door, b"c" * 40))[-1] == FINISHED
        go_on.set()
        assert (await uploading)[-1] == FINISHED
        assert (await ask(front_door, b"c" * 100))[-1] == FINISHED


async def test_each_client_has_a_salt_of_its_own() -> None:
    calls = Scripted(ANSWER)
    front_door = door(calls, Pool())
    for owner in ("one", "two", "one"):
        async with front_door.generate(GenerateRequest(), prompt_of(IDS), owner=owner) as events:
            assert [event async for event in events][-1] == FINISHED
    first, second, again = (job.cache_salt for job in calls.jobs)
    assert first == again != second
    assert len(first) == 32
