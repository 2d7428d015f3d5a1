"""The front door without a socket: scripted decode nodes, real admission, tokenising, deadlines and placement."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from cluster.front_door.front_door import FrontDoor
from cluster.front_door.placement import MAX_LOST_NODES, DecodeJob, DecodeLease, DecodePool
from cluster.front_door.plan import ServedModel
from cluster.front_door.prompt import PromptPart
from colm import prefix_routes
from colm.checkpoint import TextConfig
from colm.clock import Deadline, MonotonicClock
from colm.errors import (
    CapacityExceeded,
    ColmError,
    DeadlineExceeded,
    GoingAway,
    InvalidRequest,
    LeaseExpired,
    ModelReplaced,
    PeerFailed,
    PeerUnavailable,
    PrefillUnavailable,
    UnknownModel,
)
from colm.events import (
    Accepted,
    Event,
    Finished,
    FinishReason,
    PrefillProgress,
    Queued,
    Reserved,
    Timings,
    Token,
    Usage,
    WaitsFor,
)
from colm.line import Beat
from colm.request import GenerateRequest
from colm.sampling import SamplingParams
from colm.text.tokenizer import Tokenizer
from tests.gates import LIMIT_S
from tests.gateway import LIMITS, RETRY, TakingTurns, decode_nodes
from tests.tiny import tiny_config, tiny_tokenizer

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


async def test_unseeded_answers_of_two_requests_draw_different_numbers() -> None:
    calls = Scripted(ANSWER)
    front_door = door(calls, Pool())
    for _ in range(2):
        await ask(front_door, sampling=SamplingParams(temperature=1.0))
    assert len({job.sampling.seed for job in calls.jobs}) == 2


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


async def test_each_client_has_a_salt_of_its_own() -> None:
    calls = Scripted(ANSWER)
    front_door = door(calls, Pool())
    for owner in ("one", "two", "one"):
        async with front_door.generate(GenerateRequest(), prompt_of(IDS), owner=owner) as events:
            assert [event async for event in events][-1] == FINISHED
    first, second, again = (job.cache_salt for job in calls.jobs)
    assert first == again != second
    assert len(first) == 32
