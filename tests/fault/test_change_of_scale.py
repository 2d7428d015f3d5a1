"""Answers whose scale changes on the way: by their client, by the node's load, and across what is lost meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from itertools import groupby
from typing import Any

import pytest

from colm.checkpoint import Checkpoint
from colm.client import AsyncClient, Client
from colm.errors import InvalidRequest
from colm.events import Event, Finished, Queued, ScaleChanged, Token, WaitsFor
from colm.sampling import SamplingParams
from colm.scale import Scale
from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import common_pb2
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from decode_node import auto_scale
from decode_node.auto_scale import AutoScale
from decode_node.drafter import Drafter
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from tests.gates import LIMIT_S, gate_before
from tests.gateway import TakingTurns, gateway
from tests.nodes import decode_node, decode_requests, until_idle
from tests.oracle import assert_greedy
from tests.tiny import in_memory, tiny_checkpoint

NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there, and short prompts need nobody."""
PROMPT = (20, 9, 300, 41)
OPTIONS: dict[str, Any] = {"token_ids": PROMPT, "max_new_tokens": 24, "sampling": SamplingParams(ignore_eos=True)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def nodes(checkpoint: Checkpoint) -> AsyncIterator[list[DecodeNode]]:
    """Answers advance by one token a step."""
    async with AsyncExitStack() as stack:
        options: dict[str, Any] = {"max_batch_size": 1, "max_draft_tokens": 0}
        path = str(checkpoint.path)
        yield [await stack.enter_async_context(decode_node(path, [NOBODY], **options)) for _ in range(2)]


@pytest.fixture
async def node(nodes: list[DecodeNode]) -> DecodeNode:
    return nodes[0]


def before_step(*numbers: int) -> Any:
    """Whether a decode step has one of these numbers, counted over all engines from 0."""
    steps = iter(range(1 << 30))
    return lambda *_: next(steps) in numbers


def runs(events: Sequence[Event]) -> list[tuple[int, int]]:
    """(scale, tokens) of each stretch of tokens of one scale."""
    return [(scale, len([*each])) for scale, each in groupby(e.num_chains for e in events if isinstance(e, Token))]


def assert_as_of_a_plain_engine(checkpoint: Checkpoint, events: Sequence[Event]) -> None:
    """Each token is what the plain model chooses at the token's scale, behind the tokens before it."""
    tokens = [event for event in events if isinstance(event, Token)]
    assert len(tokens) == OPTIONS["max_new_tokens"]
    assert isinstance(events[-1], Finished)
    model, text = in_memory(checkpoint), list(PROMPT)
    for num_chains, each in groupby(tokens, lambda token: token.num_chains):
        answer = [token.token_id for token in each]
        assert_greedy(model, text, answer, num_chains)
        text += answer


async def until_the_node_knows(node: DecodeNode, num_chains: int, min_chains: int) -> None:
    """Wait until the node's only request is to be made at a scale."""
    async with asyncio.timeout(LIMIT_S):
        while [answer.job.scale.value for answer in node.answers._running] != [
            Scale(num_chains=num_chains, min_chains=min_chains)
        ]:
            await asyncio.sleep(0.005)


async def ask(client: AsyncClient, **options: Any) -> list[Event]:
    return [event async for event in client.generate(**(OPTIONS | options))]


async def read(events: AsyncIterator[Event], into: list[Event]) -> None:
    async for event in events:
        into.append(event)  # noqa: PERF401 - the test looks at what has come so far


async def test_a_client_changes_the_scale_in_mid_answer_and_again(checkpoint: Checkpoint, node: DecodeNode) -> None:
    """The step that has begun keeps its scale, the next one has the new one, and nothing is computed again."""
    async with (
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
        AsyncClient(address) as client,
    ):
        with gate_before(DecodeEngine, "step", before_step(3, 9, 14)) as gate:
            answer, events = client.generate(**OPTIONS), list[Event]()
            reading = asyncio.create_task(read(answer, events))
            for wish, held in ((1, 1), (2, 2), (None, 3)):
                await gate.until_reached()
                gate.reached.clear()
                answer.change_scale(wish)
                await until_the_node_knows(node, held, held)
                gate.open()
                gate.close()
            await reading
    assert runs(events) == [(3, 4), (1, 6), (2, 5), (3, 9)]
    changes = [event for event in events if isinstance(event, ScaleChanged)]
    assert changes == [ScaleChanged(num_chains=scale, min_chains=scale) for scale in (1, 2, 3)]
    assert node.owner._loop.counts.num_steps == OPTIONS["max_new_tokens"]
    assert node.owner._loop.counts.num_tokens == {3: 13, 1: 6, 2: 5}
    assert_as_of_a_plain_engine(checkpoint, events)


async def test_another_thread_changes_the_scale_of_a_blocking_client(checkpoint: Checkpoint, node: DecodeNode) -> None:
    async with gateway(checkpoint.config, TakingTurns([node.address])) as address:
        with gate_before(DecodeEngine, "step", before_step(5)) as gate, Client(address) as client:
            answer = client.generate(**OPTIONS)
            reading = asyncio.create_task(asyncio.to_thread(list[Event], answer))
            await gate.until_reached()
            answer.change_scale(2, min_chains=1)
            await until_the_node_knows(node, 2, 1)
            gate.open()
            events = await reading
    assert runs(events) == [(3, 6), (2, 18)]
    assert_as_of_a_plain_engine(checkpoint, events)


async def test_a_scale_that_is_asked_for_before_the_answer_begins_holds_from_its_first_token(
    checkpoint: Checkpoint, node: DecodeNode
) -> None:
    """While it waits for a place in the batch, too."""
    async with (
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
        AsyncClient(address) as client,
    ):
        with gate_before(DecodeEngine, "step") as gate:
            first = asyncio.create_task(ask(client, max_new_tokens=1))
            await gate.until_reached()
            answer, events = client.generate(**OPTIONS), list[Event]()
            reading = asyncio.create_task(read(answer, events))
            async with asyncio.timeout(LIMIT_S):
                while Queued(waits_for=WaitsFor.BATCH, num_ahead=0) not in events:
                    await asyncio.sleep(0.005)
            answer.change_scale(1)
            async with asyncio.timeout(LIMIT_S):
                while ScaleChanged(num_chains=1, min_chains=1) not in events:
                    await asyncio.sleep(0.005)
            async with asyncio.timeout(LIMIT_S):
                while not any(each.job.scale.value.num_chains == 1 for each in node.answers._running):
                    await asyncio.sleep(0.005)
            gate.open()
            await asyncio.gather(first, reading)
    assert runs(events) == [(1, 24)]
    assert_as_of_a_plain_engine(checkpoint, events)


@pytest.mark.parametrize("wish", [{"num_chains": 9}, {"num_chains": 2, "min_chains": 3}])
async def test_a_scale_that_the_model_does_not_have_ends_the_answer_by_name(
    checkpoint: Checkpoint, node: DecodeNode, wish: dict[str, int]
) -> None:
    async with (
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
        AsyncClient(address) as client,
    ):
        with gate_before(DecodeEngine, "step", before_step(2)) as gate:
            answer = client.generate(**OPTIONS)
            reading = asyncio.create_task(read(answer, []))
            await gate.until_reached()
            answer.change_scale(**wish)
            with pytest.raises(InvalidRequest, match=[*wish][-1]):
                await reading
            gate.open()
        await until_idle(node)


async def test_an_answer_whose_node_is_lost_goes_on_at_the_scale_it_had(
    checkpoint: Checkpoint, nodes: list[DecodeNode]
) -> None:
    pool = TakingTurns([node.address for node in nodes])
    async with (
        gateway(checkpoint.config, pool, num_decode_nodes=2) as address,
        AsyncClient(address) as client,
    ):
        with gate_before(DecodeEngine, "step", before_step(3, 8)) as gate:
            answer, events = client.generate(**OPTIONS), list[Event]()
            reading = asyncio.create_task(read(answer, events))
            await gate.until_reached()
            answer.change_scale(2)
            await until_the_node_knows(nodes[0], 2, 2)
            gate.open()
            gate.close()
            await gate.until_reached()
            await nodes[0]._server.stop(0)
            await reading
    assert runs(events) == [(3, 4), (2, 20)]
    assert nodes[1].owner._loop.counts.num_tokens.total() > 0
    assert_as_of_a_plain_engine(checkpoint, events)


async def test_a_call_that_reads_on_after_another_may_change_the_scale_too(
    node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.answers, "_orphan_s", LIMIT_S)
    opened, *prompt = decode_requests(PROMPT, num_chains=3, max_new_tokens=24)
    opened.open.answer_key = "key"
    resume = pb.DecodeRequest(resume=pb.ResumeDecode(answer_key="key", num_tokens=0))
    change = pb.DecodeRequest(change_scale=common_pb2.Scale(num_chains=2, min_chains=1))
    with gate_before(DecodeEngine, "step", before_step(3)) as gate:
        async with open_channel(node.address, Security()) as channel:
            stub = DecodeServiceStub(channel)
            first = stub.Decode(iter([opened, *prompt]), timeout=LIMIT_S)
            assert (await first.read()).WhichOneof("event") == "reserved"
            await gate.until_reached()
            first.cancel()
            call = stub.Decode(iter([resume, change]), timeout=LIMIT_S)
            with Outcome(call).statuses():
                kinds = []
                async for response in call:
                    kinds.append(response)
                    if response.WhichOneof("event") == "scale_changed":
                        assert response.scale_changed == change.change_scale
                        gate.open()
    assert [each.WhichOneof("event") for each in kinds].count("scale_changed") == 1
    assert [each.token.num_chains for each in kinds if each.HasField("token")] == [3] * 4 + [2] * 20


async def test_a_node_under_load_gives_chains_away_before_anybody_is_refused_and_keeps_to_the_floor(
    checkpoint: Checkpoint, node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody waits: one chain goes with each step, down to what each client put up with; one asked for all."""
    monkeypatch.setattr(auto_scale, "SHED_S", 0.0)
    async with (
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
        AsyncClient(address) as client,
    ):
        with gate_before(DecodeEngine, "step") as gate:
            wishes: list[dict[str, Any]] = [{"min_chains": 1}, {"min_chains": 2}, {"num_chains": 3}, {}]
            asking = [asyncio.create_task(ask(client, **wish)) for wish in wishes[:1]]
            await gate.until_reached()
            for wish in wishes[1:]:
                asking.append(asyncio.create_task(ask(client, **wish)))
                async with asyncio.timeout(LIMIT_S):
                    while node.owner._loop._scheduler.num_waiting < len(asking) - 1:
                        await asyncio.sleep(0.005)
            gate.open()
            answers = await asyncio.gather(*asking)
    assert [runs(events) for events in answers] == [[(3, 1), (2, 1), (1, 22)], [(2, 24)], [(3, 24)], [(3, 24)]]
    for events in answers:
        assert_as_of_a_plain_engine(checkpoint, events)
    assert node.owner._loop.auto_scale.level == 3, "it rests"


async def test_answers_that_draft_keep_to_the_nodes_level_and_to_the_plain_engines_tokens(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The level falls in mid-draft: what is verified then has the new scale as a whole."""
    monkeypatch.setattr(Drafter, "num_drafts", lambda *_: 3)
    monkeypatch.setattr(AutoScale, "note", lambda *_: None)
    levels = iter([3] * 7 + [2] * 9 + [1] * 5 + [3] * 99)
    async with decode_node(str(checkpoint.path), [NOBODY]) as node:
        policy = node.owner._loop.auto_scale
        step = DecodeEngine.step

        def step_then_change(engine: DecodeEngine, plan: Any) -> Any:
            policy.level = next(levels)
            return step(engine, plan)

        monkeypatch.setattr(DecodeEngine, "step", step_then_change)
        async with (
            gateway(checkpoint.config, TakingTurns([node.address])) as address,
            AsyncClient(address) as client,
        ):
            events = await ask(client, min_chains=1)
    assert [scale for scale, _ in runs(events)] == [3, 2, 1, 3]
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_draft_tokens > 0
    assert_as_of_a_plain_engine(checkpoint, events)
