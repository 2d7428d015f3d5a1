"""Requests that must wait: in order, told where they stand, refused only where waiting is useless."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from itertools import count

import grpc
import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.errors import ColmError, DeadlineExceeded, LeaseExpired
from colm.kv import KvTile
from colm.leases import LeaseTable
from colm.wire import prompt_stream
from colm.wire.endpoint import open_channel
from colm.wire.security import Security
from colm.wire.status import error_of
from colm.wire.tile_codec import pull_kv_stub
from colm.wire.v1 import common_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from decode_node.requests import DecodeJob, Emit, RequestOwner
from prefill_node import quantum
from prefill_node.engine import PrefillEngine
from prefill_node.job_policy import FIRST_SHARE
from prefill_node.prefill_run import PrefillRun
from tests.gates import LIMIT_S, gate_before
from tests.nodes import decode, decode_node, pages_bytes, prefill_node
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(3)).tolist()
PAGES_OF_ONE = 5  # 60 prompt tokens and 8 new ones


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def small(checkpoint: Checkpoint) -> AsyncIterator[DecodeNode]:
    """A decode node with pages for one request."""
    path, kv_cache_bytes = str(checkpoint.path), pages_bytes(checkpoint.config, PAGES_OF_ONE)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], kv_cache_bytes=kv_cache_bytes) as node,
    ):
        yield node


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def failure(address: str, token_ids: list[int] = PROMPT, **request: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode(address, token_ids, **request)  # type: ignore[arg-type]
    return caught.value


async def test_requests_beyond_the_pages_wait_in_order_and_are_all_answered(small: DecodeNode) -> None:
    """Bug: of 16 clients with room for 4, 12 were refused within 0.1 s."""
    with gate_before(DecodeEngine, "step") as gate:
        first = asyncio.create_task(decode(small.address, PROMPT, request_id="0"))
        await gate.until_reached()
        waiting = []
        for number in range(1, 5):
            waiting.append(asyncio.create_task(decode(small.address, PROMPT, request_id=str(number))))
            await until(lambda: small.page_line.num_waiting == len(waiting))
        gate.open()
        answers = [await first, *[await task for task in waiting]]
    assert len({answer.token_ids for answer in answers}) == 1
    assert answers[0].waits == []
    for number, answer in enumerate(answers[1:]):
        places = [num_ahead for waits_for, num_ahead in answer.waits if waits_for == pb.WAITS_FOR_PAGES]
        assert places[0] == number
        assert places == sorted(places, reverse=True)
        assert answer.timings.queue_s > 0


async def test_a_request_that_can_never_fit_is_not_told_to_try_later(small: DecodeNode) -> None:
    error = await failure(small.address, max_new_tokens=64)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "8 KV pages and a decode node has 5 in all" in error.details()
    assert "decode.kv_cache_bytes" in error.details()


async def test_a_caller_that_will_not_wait_is_refused_at_once(small: DecodeNode) -> None:
    with gate_before(DecodeEngine, "step") as gate:
        first = asyncio.create_task(decode(small.address, PROMPT, request_id="first"))
        await gate.until_reached()
        error = await failure(small.address, request_id="second", only_if_room=True)
        gate.open()
        await first
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "needs 5 KV pages; 0 of 5 are free" in error.details()


async def test_a_deadline_that_passes_in_the_line_says_so_and_makes_room(small: DecodeNode) -> None:
    with gate_before(DecodeEngine, "step") as gate:
        first = asyncio.create_task(decode(small.address, PROMPT, request_id="first"))
        await gate.until_reached()
        error = await failure(small.address, request_id="late", timeout_s=0.3)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not small.page_line.num_waiting)
        gate.open()
        await first


async def test_the_requests_on_a_node_are_bounded(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address], max_requests=2) as node:
        with gate_before(DecodeEngine, "step") as gate:
            running = [asyncio.create_task(decode(node.address, PROMPT, request_id=str(i))) for i in range(2)]
            await until(lambda: sum(node.owner.stages().values()) == 2)
            error = await failure(node.address, request_id="third")
            gate.open()
            await asyncio.gather(*running)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 requests are on this decode node already" in error.details()


async def test_an_id_that_is_running_is_refused(small: DecodeNode) -> None:
    with gate_before(DecodeEngine, "step") as gate:
        first = asyncio.create_task(decode(small.address, PROMPT))
        await gate.until_reached()
        error = await failure(small.address)
        gate.open()
        await first
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "request_id='r'" in error.details()


BAD = {
    "vocabulary": ({"token_ids": [1, 320]}, "token_ids=320: must be below the vocabulary size 320"),
    "context": ({"token_ids": [1] * 500, "max_new_tokens": 13}, "must fit the model's context of 512"),
    "scale": ({"num_chains": 4}, "num_chains=4: must be between 1 and 3"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_decode_node_checks_what_its_caller_should_have_checked(small: DecodeNode, case: str) -> None:
    request, message = BAD[case]
    error = await failure(small.address, **request)  # type: ignore[arg-type]
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()


async def test_waiting_for_a_busy_prefill_node_is_told_and_is_no_prefill(checkpoint: Checkpoint) -> None:
    """Two decode nodes share a prefill node, so the second prompt waits there, behind the first."""
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(decode_node(path, [prefill.address])) for _ in range(2)]
        with gate_before(PrefillEngine, "step") as gate:
            first = asyncio.create_task(decode(nodes[0].address, PROMPT))
            await gate.until_reached()
            second = asyncio.create_task(decode(nodes[1].address, PROMPT))
            await until(lambda: prefill.service.load.num_queued)
            assert (prefill.service.load.num_active, prefill.service.load.num_queued) == (1, 1)
            await asyncio.sleep(1.0)  # the time that must count as waiting
            gate.open()
            answer = await second
            await first
    assert (pb.WAITS_FOR_PREFILL_NODE, 0) in answer.waits
    queued = [response.queued for response in answer.responses if response.WhichOneof("event") == "queued"]
    assert any(event.estimated_wait_s > 0 for event in queued)
    assert answer.timings.queue_s >= 1.0
    assert 0 < answer.timings.prefill_s < answer.timings.queue_s
    assert answer.timings.first_token_s >= answer.timings.queue_s + answer.timings.prefill_s


async def test_prompts_of_one_node_wait_where_any_free_prefill_node_can_take_them(checkpoint: Checkpoint) -> None:
    """Bug: a short prompt was bound to the replica that computed a long one, while the other replica was idle."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as one,
        prefill_node(path) as other,
        decode_node(path, [one.address, other.address]) as node,
    ):
        long = PROMPT * 4
        with gate_before(PrefillEngine, "step", lambda _, runs: runs[0].num_tokens == len(long) - 1) as gate:
            held = asyncio.create_task(decode(node.address, long, request_id="long"))
            await gate.until_reached()
            short = [asyncio.create_task(decode(node.address, PROMPT, request_id=str(i))) for i in range(4)]
            await asyncio.gather(*short)
            assert not held.done()
            gate.open()
            await held


async def test_short_prompts_go_before_a_long_one_that_their_only_node_has_begun(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: with one prefill node, everybody waited for the end of the prompt that it computed."""
    monkeypatch.setattr(quantum, "QUANTUM_S", 0.0)
    path, long, steps = str(checkpoint.path), PROMPT * 8, list[int]()
    step = PrefillEngine.step

    def noted(engine: PrefillEngine, runs: Sequence[PrefillRun]) -> list[KvTile | None]:
        steps.extend(run.num_tokens for run in runs)
        return step(engine, runs)

    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        monkeypatch.setattr(PrefillEngine, "step", noted)
        with gate_before(PrefillEngine, "step") as gate:
            held = asyncio.create_task(decode(node.address, long, request_id="long"))
            await gate.until_reached()
            shorts = [asyncio.create_task(decode(node.address, PROMPT, request_id=str(i))) for i in range(4)]
            await until(lambda: prefill.service.load.num_queued == len(shorts))
            gate.open()
            answers = await asyncio.gather(*shorts)
            await held
    assert len({answer.token_ids for answer in answers}) == 1
    num_short_steps = steps.count(len(PROMPT) - 1)
    assert num_short_steps == len(shorts) * 2 * 2  # layers of tiles
    last = len(steps) - 1 - steps[::-1].index(len(PROMPT) - 1)
    # The long one's first step, and its share.
    assert last <= 1 + num_short_steps / (1 - FIRST_SHARE)


async def test_what_a_prefill_node_refuses_is_the_requests_answer(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path, memory_bytes=150_000) as prefill, decode_node(path, [prefill.address]) as node:
        error = await failure(node.address, PROMPT * 8)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "prefill.memory_bytes" in error.details()
    async with prefill_node(path, max_queued_s=1e-9) as prefill, AsyncExitStack() as stack:
        node = await stack.enter_async_context(decode_node(path, [prefill.address]))
        with gate_before(PrefillEngine, "step") as gate:
            first = asyncio.create_task(decode(node.address, PROMPT, request_id="first"))
            await gate.until_reached()
            error = await failure(node.address, request_id="second")
            gate.open()
            await first
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "would wait about 0 s at this prefill node" in error.details()


@pytest.mark.parametrize("another_has_room", [True, False])
async def test_a_prefill_nodes_refusal_is_passed_on_only_when_the_others_have_been_asked(
    checkpoint: Checkpoint, another_has_room: bool
) -> None:
    """Bug: a prompt was refused for the hours of work at one node, beside another that was idle."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path, max_queued_s=1e-9) as busy,
        prefill_node(path, max_queued_s=1e9 if another_has_room else 1e-9) as other,
        decode_node(path, [busy.address]) as first,
        decode_node(path, [other.address]) as second,
        decode_node(path, [busy.address, other.address]) as node,
    ):
        engines = [busy.service._engine, other.service._engine]
        with gate_before(PrefillEngine, "step", lambda engine, _: engine in engines[: 2 - another_has_room]) as gate:
            holding = [asyncio.create_task(decode(first.address, PROMPT, request_id="first"))]
            await gate.until_reached()
            if another_has_room:
                answer = await decode(node.address, PROMPT, request_id="second")
                assert answer.usage.num_kv_streams == 2
            else:
                gate.reached.clear()
                holding.append(asyncio.create_task(decode(second.address, PROMPT, request_id="holding")))
                await gate.until_reached()
                error = await failure(node.address, request_id="second")
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "at this prefill node, longer than prefill.max_queued_s" in error.details()
            gate.open()
            await asyncio.gather(*holding)


async def test_a_full_batch_is_waited_for_with_a_word(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address], max_batch_size=1) as node:
        with gate_before(DecodeEngine, "step") as gate:
            first = asyncio.create_task(decode(node.address, PROMPT, request_id="first"))
            await gate.until_reached()
            second = asyncio.create_task(decode(node.address, PROMPT, request_id="second"))
            await until(lambda: node.load.num_active == 2)
            gate.open()
            await first
            answer = await second
    assert (pb.WAITS_FOR_BATCH, 0) in answer.waits


async def test_who_waits_for_a_full_batch_is_told_for_how_long(checkpoint: Checkpoint) -> None:
    """From the tokens that the answers ahead may still get, and what tokens took; unknown before any was made."""
    path, numbers = str(checkpoint.path), count()
    async with decode_node(path, ["127.0.0.1:9"], max_batch_size=1, max_draft_tokens=0) as node:
        with gate_before(DecodeEngine, "step", lambda *_: next(numbers) in (0, 4)) as gate:
            calls = [asyncio.create_task(decode(node.address, PROMPT[:9], request_id="0", max_new_tokens=40))]
            for number in (1, 2):
                await gate.until_reached()
                gate.reached.clear()
                calls.append(asyncio.create_task(decode(node.address, PROMPT[:9], request_id=str(number))))
                await until(lambda: node.load.num_active == len(calls))
                gate.open()
                gate.close()
            gate.open()
            answers = await asyncio.gather(*calls)
    first, second = (
        next(each.queued for each in answer.responses if each.WhichOneof("event") == "queued") for answer in answers[1:]
    )
    assert (first.num_ahead, first.HasField("estimated_wait_s")) == (0, False)
    assert second.num_ahead == 1
    assert second.estimated_wait_s > 0


async def test_who_waits_for_pages_is_told_for_how_long_once_anybody_can_tell(small: DecodeNode) -> None:
    """From the tokens that running answers may still get, and what prefills took, of those ahead too."""
    numbers = count()
    with gate_before(DecodeEngine, "step", lambda *_: next(numbers) in (0, 4)) as gate:
        calls = [asyncio.create_task(decode(small.address, PROMPT, request_id="0", max_draft_tokens=0))]
        for number in (1, 2):
            await gate.until_reached()
            gate.reached.clear()
            calls.append(asyncio.create_task(decode(small.address, PROMPT, request_id=str(number))))
            await until(lambda: small.page_line.num_waiting == len(calls) - 1)
            if number == 2:
                first, second = small.owner._page_wait_s(0), small.owner._page_wait_s(1)
            gate.open()
            gate.close()
        gate.open()
        answers = await asyncio.gather(*calls)
    told = [next(each.queued for each in answer.responses if each.HasField("queued")) for answer in answers[1:]]
    assert [each.waits_for for each in told] == [pb.WAITS_FOR_PAGES] * 2
    assert not told[0].HasField("estimated_wait_s")  # before any token was made
    assert first is not None
    assert second is not None
    assert told[1].estimated_wait_s >= second > first > 0  # the second waits for the first one's prefill and answer


async def test_a_call_that_never_says_what_it_wants_does_not_stay(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: 64 calls without `open` locked all clients out, since the deadline only began with `open`."""
    monkeypatch.setattr(prompt_stream, "OPEN_TIMEOUT_S", 0.05)
    path = str(checkpoint.path)
    may_speak = asyncio.Event()

    async def nothing() -> AsyncIterator[object]:
        await may_speak.wait()
        yield None

    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        for address, stub in ((node.address, lambda c: DecodeServiceStub(c).Decode), (prefill.address, pull_kv_stub)):
            async with open_channel(address, Security()) as channel:
                call = stub(channel)(nothing())
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call:
                        pass
                error = error_of(caught.value, "node")
                assert isinstance(error, DeadlineExceeded)
                assert "`open` did not come" in str(error)
        may_speak.set()


async def test_a_call_without_a_lease_is_told_to_get_a_new_one(checkpoint: Checkpoint) -> None:
    path, leases = str(checkpoint.path), LeaseTable(30.0)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address], leases=leases) as node:
        error: ColmError = error_of(await failure(node.address, lease_id="gone"), "decode node")
        assert isinstance(error, LeaseExpired)
        lease = leases.grant()
        assert len((await decode(node.address, PROMPT, lease_id=lease.lease_id)).token_ids) == 8
        assert len(leases) == 0


async def test_a_calls_deadline_is_its_requests(small: DecodeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[DecodeJob] = []
    run = RequestOwner.run

    async def noted(owner: RequestOwner, job: DecodeJob, emit: Emit) -> None:
        jobs.append(job)
        await run(owner, job, emit)

    monkeypatch.setattr(RequestOwner, "run", noted)
    await decode(small.address, PROMPT, timeout_s=1000.0)
    await decode(small.address, PROMPT, timeout_s=None)
    with_deadline, without = jobs
    assert with_deadline.deadline is not None
    # gRPC rounds a call's timeout up, to tens of seconds beyond 1000; the caller keeps its own deadline.
    assert 900 < with_deadline.deadline.remaining_s() < 1100
    assert without.deadline is None
