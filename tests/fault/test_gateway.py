"""The gateway over real decode nodes that are full, gone or slow."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.errors import CapacityExceeded, DeadlineExceeded, InvalidRequest, LeaseExpired, PeerUnavailable
from colm.events import Accepted, Event, Finished, PrefillProgress, Queued, Token, WaitsFor
from colm.leases import LeaseTable
from colm.wire import prompt_stream
from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S, gate_before
from tests.gateway import TakingTurns, gateway
from tests.nodes import decode, decode_node, pages_bytes, prefill_node
from tests.tiny import tiny_checkpoint

PROMPT = list(range(5, 65))
PAGES_OF_ONE = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def prefill(checkpoint: Checkpoint) -> AsyncIterator[PrefillNode]:
    async with prefill_node(str(checkpoint.path)) as node:
        yield node


@pytest.fixture
async def small_nodes(checkpoint: Checkpoint, prefill: PrefillNode) -> AsyncIterator[list[DecodeNode]]:
    """Two decode nodes, each with pages for one request."""
    kv_cache_bytes = pages_bytes(checkpoint.config, PAGES_OF_ONE)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                decode_node(str(checkpoint.path), [prefill.address], kv_cache_bytes=kv_cache_bytes)
            )
            for _ in range(2)
        ]


async def ask(address: str, **options: Any) -> list[Event]:
    async with AsyncClient(address) as client:
        return [event async for event in client.generate(**{"token_ids": PROMPT, **options})]


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_full_decode_node_is_passed_over_for_one_with_room(
    checkpoint: Checkpoint, small_nodes: list[DecodeNode]
) -> None:
    """Bug: the client got the first node's refusal although another node had room."""
    full, free = small_nodes
    pool = TakingTurns([full.address, free.address])
    async with gateway(checkpoint.config, pool, num_decode_nodes=2) as address:
        full_engine = full.owner._loop._engine
        with gate_before(DecodeEngine, "step", lambda engine, _: engine is full_engine) as gate:
            held = asyncio.create_task(decode(full.address, PROMPT, num_chains=3))
            await gate.until_reached()
            events = await ask(address)
            assert not held.done()
            gate.open()
            assert tokens_of(events) == list((await held).token_ids)
    assert pool.lent == [full.address, free.address]


async def test_when_all_nodes_are_full_the_request_waits_at_the_last_and_is_told(
    checkpoint: Checkpoint, small_nodes: list[DecodeNode]
) -> None:
    pool = TakingTurns([node.address for node in small_nodes])
    async with gateway(checkpoint.config, pool, num_decode_nodes=2) as address:
        with gate_before(DecodeEngine, "step") as gate:
            held = [asyncio.create_task(decode(node.address, PROMPT)) for node in small_nodes]
            await until(lambda: gate.num_arrived == 2)
            waiting = asyncio.create_task(ask(address))
            await until(lambda: any(node.page_line.num_waiting for node in small_nodes))
            gate.open()
            events = await waiting
            await asyncio.gather(*held)
    assert Queued(waits_for=WaitsFor.PAGES, num_ahead=0) in events
    assert isinstance(events[-1], Finished)


async def test_a_request_that_can_never_fit_is_refused_at_the_first_node(
    checkpoint: Checkpoint, small_nodes: list[DecodeNode]
) -> None:
    pool = TakingTurns([node.address for node in small_nodes])
    async with gateway(checkpoint.config, pool, num_decode_nodes=2) as address:
        with pytest.raises(InvalidRequest, match=r"max_new_tokens='?64'?.*KV pages"):
            await ask(address, max_new_tokens=64)
    assert len(pool.lent) == 1


async def test_a_lost_lease_is_replaced_a_few_times(checkpoint: Checkpoint, prefill: PrefillNode) -> None:
    """Bug: an expired lease was INVALID_ARGUMENT about a field that the client never sent."""
    leases = LeaseTable(30.0)
    async with decode_node(str(checkpoint.path), [prefill.address], leases=leases) as strict:
        pool = TakingTurns([strict.address], lease_id="gone")
        async with gateway(checkpoint.config, pool) as address:
            with pytest.raises(LeaseExpired, match="lease 'gone'"):
                await ask(address)
            assert len(pool.lent) == 4
            pool._lease_id = leases.grant().lease_id
            assert len(tokens_of(await ask(address))) == 8


async def test_a_dead_decode_node_is_one_clear_error(checkpoint: Checkpoint) -> None:
    async with gateway(checkpoint.config, TakingTurns(["127.0.0.1:1"])) as address:
        with pytest.raises(PeerUnavailable, match=r"decode node 127\.0\.0\.1:1 is not reachable"):
            await ask(address)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "options", "timeout_s"),
    [
        (20, {}, 100.0 + 2.0 + 4.0),
        (60, {}, 100.0 + 6.0 + 4.0),
        (60, {"max_new_tokens": 100}, 100.0 + 6.0 + 50.0),
        (60, {"timeout_s": 60.0}, 60.0),
    ],
)
async def test_a_deadline_that_nobody_set_grows_with_the_work(
    checkpoint: Checkpoint, prefill: PrefillNode, num_prompt_tokens: int, options: dict[str, Any], timeout_s: float
) -> None:
    """Bug: a 1M-token prefill could not meet the default deadline, and nothing said so."""
    async with (
        decode_node(str(checkpoint.path), [prefill.address]) as node,
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
    ):
        accepted = (await ask(address, token_ids=PROMPT[:num_prompt_tokens], **options))[0]
    assert isinstance(accepted, Accepted)
    assert accepted.timeout_s == pytest.approx(timeout_s, abs=1.0)


async def test_a_derived_deadline_is_no_longer_than_any_may_be(checkpoint: Checkpoint, prefill: PrefillNode) -> None:
    async with (
        decode_node(str(checkpoint.path), [prefill.address]) as node,
        gateway(checkpoint.config, TakingTurns([node.address]), max_timeout_s=101.0) as address,
    ):
        accepted = (await ask(address))[0]
    assert isinstance(accepted, Accepted)
    assert accepted.timeout_s == 101.0


async def test_the_deadline_reaches_the_decode_node_and_frees_it(checkpoint: Checkpoint, prefill: PrefillNode) -> None:
    async with (
        decode_node(str(checkpoint.path), [prefill.address]) as node,
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
    ):
        with gate_before(DecodeEngine, "step") as gate:
            with pytest.raises(DeadlineExceeded, match="timeout_s=1 "):
                await ask(address, timeout_s=1.0)
            await until(lambda: not node.owner.stages())
            gate.open()


async def test_a_request_behind_another_prefill_hears_that_it_waits_and_for_how_long(
    checkpoint: Checkpoint, prefill: PrefillNode
) -> None:
    async with (
        decode_node(str(checkpoint.path), [prefill.address]) as node,
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
    ):
        with gate_before(PrefillEngine, "step") as gate:
            first = asyncio.create_task(ask(address))
            await gate.until_reached()
            events = []
            async with AsyncClient(address) as client:
                async for event in client.generate(token_ids=PROMPT):
                    events.append(event)
                    if isinstance(event, Queued):
                        gate.open()
            await first
    kinds = [type(event) for event in events]
    queued = events[kinds.index(Queued)]
    assert isinstance(queued, Queued)
    assert (queued.waits_for, queued.num_ahead) == (WaitsFor.PREFILL_NODE, 0)
    assert queued.estimated_wait_s is not None
    assert queued.estimated_wait_s > 0
    assert kinds.index(Queued) < kinds.index(PrefillProgress) < kinds.index(Token)


async def test_the_requests_inside_are_bounded(checkpoint: Checkpoint, prefill: PrefillNode) -> None:
    async with (
        decode_node(str(checkpoint.path), [prefill.address]) as node,
        gateway(checkpoint.config, TakingTurns([node.address]), max_requests=1) as address,
    ):
        with gate_before(DecodeEngine, "step") as gate:
            first = asyncio.create_task(ask(address))
            await gate.until_reached()
            with pytest.raises(CapacityExceeded, match="1 requests are inside the gateway already"):
                await ask(address)
            gate.open()
            await first


async def test_a_call_that_never_says_what_it_wants_does_not_keep_its_place(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: 64 such calls locked all clients out until their connections went away."""
    monkeypatch.setattr(prompt_stream, "OPEN_TIMEOUT_S", 0.05)
    may_speak = asyncio.Event()

    async def nothing() -> AsyncIterator[object]:
        await may_speak.wait()
        yield None

    async with gateway(checkpoint.config, TakingTurns(["127.0.0.1:1"]), max_requests=1) as address:
        async with open_channel(address, Security()) as channel:
            call = GenerationServiceStub(channel).Generate(nothing())
            with (
                pytest.raises(DeadlineExceeded, match="`open` did not come"),
                Outcome(call).errors("gateway"),
            ):
                await call.read()
            may_speak.set()
        with pytest.raises(PeerUnavailable):
            await ask(address)


async def test_an_upload_that_falls_silent_does_not_keep_its_place(checkpoint: Checkpoint) -> None:
    """Bug: 64 such uploads locked all clients out for an hour."""
    may_go_on = asyncio.Event()

    async def silent() -> AsyncIterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(open=pb.OpenGenerate())
        yield pb.GenerateRequest(document=b"once upon")
        await may_go_on.wait()

    pool = TakingTurns(["127.0.0.1:1"])
    async with gateway(checkpoint.config, pool, max_requests=1, upload_idle_s=1.0) as address:
        async with open_channel(address, Security()) as channel:
            call = GenerationServiceStub(channel).Generate(silent(), timeout=LIMIT_S)
            with pytest.raises(DeadlineExceeded, match="next piece of the prompt"), Outcome(call).errors("gateway"):
                await call.read()
            may_go_on.set()
        with pytest.raises(PeerUnavailable):
            await ask(address)


async def test_a_refusal_in_the_middle_of_an_upload_is_the_async_clients_error_too(checkpoint: Checkpoint) -> None:
    """Bug: gRPC's asyncio client replaced every second refusal by "Internal error from Core"."""
    async with (
        gateway(checkpoint.config, TakingTurns(["127.0.0.1:1"]), max_document_bytes=1 << 18) as address,
        AsyncClient(address) as client,
    ):
        for _ in range(10):
            with pytest.raises(InvalidRequest, match="at most 262144 bytes"):
                await anext(client.generate(b"x" * (4 << 20), "?"))
