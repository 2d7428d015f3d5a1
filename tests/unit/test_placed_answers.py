"""Which decode node gets an answer, with scripted ones: refusals, lost nodes, prompts that begin alike."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import numpy as np
import pytest

from cluster.front_door.placement import MAX_LOST_NODES, DecodeLease
from colm import prefix_routes
from colm.errors import (
    CapacityExceeded,
    ColmError,
    InvalidRequest,
    LeaseExpired,
    ModelReplaced,
    PeerFailed,
    PeerUnavailable,
    PrefillUnavailable,
)
from colm.events import Accepted, Event, Finished, PrefillProgress, Queued, Token
from colm.line import Beat
from colm.sampling import SamplingParams
from tests.gateway import RETRY
from tests.scripted_nodes import ANSWER, FINISHED, TOKEN, Pool, Scripted, ask, assert_nothing_held, door, generate


async def test_an_answer_goes_on_with_the_weights_that_it_began_with_alone() -> None:
    calls = Scripted(ANSWER)
    front_door = door(calls, Pool())
    accepted, *_ = await ask(front_door, answer_token_ids=(7,), revision="r")
    assert isinstance(accepted, Accepted)
    assert accepted.revision == "r"
    with pytest.raises(ModelReplaced, match="submit the request anew"):
        await ask(front_door, answer_token_ids=(7,), revision="of another checkpoint")
    assert len(calls.jobs) == 1
    await ask(front_door, revision="of another checkpoint")  # nothing has been said


async def test_each_node_is_asked_for_room_at_once_before_one_is_waited_for() -> None:
    calls, pool = Scripted([CapacityExceeded("full")], [CapacityExceeded("full")], ANSWER), Pool()
    assert (await ask(door(calls, pool, num_decode_nodes=3)))[-1] == FINISHED
    assert calls.only_if_room == [True, True, False]
    assert pool.lent == ["one", "two", "three"]
    assert len({job.request_id for job in calls.jobs}) == 1


@pytest.mark.parametrize("num_decode_nodes", [0, 1, 2])
async def test_the_last_refusal_is_the_callers(num_decode_nodes: int) -> None:
    calls, pool = Scripted([CapacityExceeded("full")]), Pool()
    front_door = door(calls, pool, num_decode_nodes=num_decode_nodes)
    with pytest.raises(CapacityExceeded, match="full"):
        await ask(front_door)
    assert len(calls.jobs) == max(1, num_decode_nodes)
    assert_nothing_held(front_door, calls, pool)


async def test_lost_leases_are_replaced_three_times_and_cost_no_room_elsewhere() -> None:
    lost, full = [LeaseExpired("gone")], [CapacityExceeded("full")]
    calls = Scripted(lost, full, lost, lost, ANSWER)
    assert (await ask(door(calls, Pool(), num_decode_nodes=2)))[-1] == FINISHED
    assert calls.only_if_room == [True, True, False, False, False]
    calls, pool = Scripted(lost), Pool()
    front_door = door(calls, pool)
    with pytest.raises(LeaseExpired):
        await ask(front_door)
    assert len(calls.jobs) == 4
    assert_nothing_held(front_door, calls, pool)


async def test_a_call_lost_before_the_node_said_anything_is_made_again_under_a_name_of_its_own() -> None:
    """A connection that broke between two requests is noticed by the second one."""
    calls = Scripted([PeerUnavailable("lost")], [PeerUnavailable("lost")], ANSWER)
    events = await ask(door(calls, Pool()))
    assert events[-1] == FINISHED
    assert isinstance(events[0], Accepted)
    name = events[0].request_id
    assert [job.request_id for job in calls.jobs] == [name, f"{name}-1", f"{name}-2"]


async def test_the_node_after_one_that_failed_by_itself_goes_on_with_the_answer() -> None:
    """Bug: a defect of one decode node ended the answer, while another would have gone on with it."""
    calls, pool = Scripted([*ANSWER[:3], PeerFailed("out of memory")], ANSWER), Pool()
    told: list[ColmError] = []
    front_door = door(calls, pool, num_decode_nodes=3, on_resubmit=told.append)
    assert isinstance((await ask(front_door))[-1], Finished)
    assert [job.made_token_ids for job in calls.jobs] == [(), (7,)]
    assert pool.lent[0] != pool.lent[1]
    assert [type(error) for error in told] == [PeerFailed]
    assert_nothing_held(front_door, calls, pool)


async def test_a_second_node_that_fails_by_itself_ends_the_answer() -> None:
    calls, pool = (
        Scripted([PeerFailed("first")], [*ANSWER[:3], PeerUnavailable("lost")], [PeerFailed("second")]),
        Pool(),
    )
    front_door = door(calls, pool, num_decode_nodes=3)
    with pytest.raises(PeerFailed, match="second"):
        await ask(front_door)
    assert len(calls.jobs) == 3
    assert_nothing_held(front_door, calls, pool)


@pytest.mark.parametrize("error", [PrefillUnavailable("gave up"), InvalidRequest("a", 1, "b")])
async def test_any_other_error_of_a_node_ends_the_answer_once(error: ColmError) -> None:
    calls, pool = Scripted([*ANSWER[:3], error]), Pool()
    front_door = door(calls, pool, num_decode_nodes=3)
    seen: list[Event] = []

    async def read() -> None:
        async with generate(front_door) as events:
            seen.extend([await anext(events) for _ in range(3)])
            await anext(events)

    with pytest.raises(type(error)) as raised:
        await read()
    assert raised.value is error
    assert [type(event) for event in seen] == [Accepted, PrefillProgress, Token]
    assert len(calls.jobs) == 1
    assert_nothing_held(front_door, calls, pool)


async def test_the_node_after_a_lost_one_gets_the_answer_so_far_and_the_same_random_numbers() -> None:
    calls, pool = Scripted([*ANSWER[:3], TOKEN, PeerUnavailable("lost")], ANSWER[:3], ANSWER), Pool()
    front_door = door(calls, pool, num_decode_nodes=3)
    events = await ask(front_door, sampling=SamplingParams(temperature=1.0))
    assert [job.made_token_ids for job in calls.jobs] == [(), (7, 7), (7, 7, 7)]
    assert len({job.sampling for job in calls.jobs}) == 1
    assert calls.jobs[0].sampling.seed is not None
    assert [type(event) for event in events if not isinstance(event, PrefillProgress)] == [
        Accepted, Token, Token, Queued, Token, Queued, Token, Finished
    ]  # fmt: skip
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.num_decode_nodes == 3
    assert pool.lent == ["one", "three", "two"]
    assert_nothing_held(front_door, calls, pool)


async def test_a_request_that_loses_every_node_it_is_given_to_is_given_up() -> None:
    """It may be what they die of."""
    calls, pool = Scripted(ANSWER[:3]), Pool()
    front_door = door(calls, pool)
    with pytest.raises(PeerUnavailable, match="ended the answer before it was finished"):
        await ask(front_door)
    assert len(calls.jobs) == MAX_LOST_NODES + 1
    assert_nothing_held(front_door, calls, pool)


async def test_an_answer_whose_node_was_lost_waits_for_room_at_another() -> None:
    full = [CapacityExceeded("full")]
    calls, pool = Scripted([*ANSWER[:3], PeerUnavailable("lost")], full, full, ANSWER), Pool()
    assert isinstance((await ask(door(calls, pool)))[-1], Finished)
    calls = Scripted([*ANSWER[:3], PeerUnavailable("lost")], full)
    front_door = door(calls, pool)
    with pytest.raises(CapacityExceeded, match="full"):
        await ask(front_door)
    assert len(calls.jobs) == 1 + RETRY.max_attempts - 1
    assert_nothing_held(front_door, calls, pool)


async def test_a_prompt_that_begins_alike_goes_to_the_node_that_had_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_routes, "BLOCK_TOKENS", 64)
    document = np.arange(200) + 5
    pool, calls = Pool(), Scripted(ANSWER)
    front_door = door(calls, pool, num_decode_nodes=3, addresses=["one", "two", "three"])
    for last in (7, 8, 9):
        await ask(front_door, np.append(document, last), max_new_tokens=1)
    assert pool.lent == ["one"] * 3
    assert len({job.cache_salt for job in calls.jobs}) == 1


async def test_where_the_node_that_had_its_beginning_has_no_room_a_prompt_goes_to_another() -> None:
    """And nobody waits for the one while others are free."""
    pool = Pool()
    calls = Scripted(ANSWER, [CapacityExceeded("full")], ANSWER)
    front_door = door(calls, pool, num_decode_nodes=3, addresses=["one", "two", "three"])
    assert [(await ask(front_door))[-1] for _ in range(2)] == [FINISHED] * 2
    assert pool.lent == ["one", "one", "three"]
    assert calls.only_if_room == [True, True, True]


async def test_where_the_node_that_had_its_beginning_is_not_lent_another_one_serves() -> None:
    class Busy(Pool):
        """Lends one node to nobody who wants only that."""

        @asynccontextmanager
        async def lease(self, *, beat: Beat, refused_by: Collection[str] = ()) -> AsyncIterator[DecodeLease]:
            if {"two", "three"} <= {*refused_by}:
                raise CapacityExceeded("no other decode node is free")
            async with super().lease(beat=beat, refused_by=refused_by) as lease:
                yield lease

    pool = Busy()
    front_door = door(Scripted(ANSWER), pool, num_decode_nodes=3, addresses=["one", "two", "three"])
    assert [(await ask(front_door))[-1] for _ in range(2)] == [FINISHED] * 2
    assert pool.lent == ["one", "two"]
