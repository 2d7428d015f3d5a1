"""Gateways that are lost in the middle of an answer: the client gets the rest from the next one, each token once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.client_tokens import Client as NamedClient
from cluster.client_tokens import Clients
from colm.checkpoint import Checkpoint
from colm.client import AsyncClient, Client
from colm.errors import ConnectionLost, InvalidRequest, UnknownAnswer
from colm.events import Accepted, Event, Finished, Reconnecting, Token
from colm.sampling import SamplingParams
from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from tests.answers import assert_same_answer
from tests.gates import LIMIT_S, Gate, gate_before
from tests.gateway import RunningGateway, TakingTurns, killable_gateway
from tests.nodes import decode_node, prefill_node, until_idle
from tests.tiny import tiny_checkpoint, tiny_config

PROMPT = list(range(5, 105))
SEEDED = SamplingParams(ignore_eos=True, temperature=1.3, top_p=0.9, seed=11, top_logprobs=3)
OPTIONS: dict[str, Any] = {"token_ids": PROMPT, "max_new_tokens": 40, "sampling": SEEDED, "num_chains": 2}
FOR_EVER_S = 1e6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(vocab_size=270))


@pytest.fixture
async def prefill(checkpoint: Checkpoint) -> AsyncIterator[PrefillNode]:
    async with prefill_node(str(checkpoint.path)) as node:
        yield node


@dataclass
class Site:
    """Decode nodes, and a gateway before them that can be lost and started again at the same address."""

    checkpoint: Checkpoint
    nodes: list[DecodeNode]
    stack: AsyncExitStack
    pools: list[TakingTurns] = field(default_factory=list)
    gateways: list[RunningGateway] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.gateways[-1].address

    async def start(self, clients: Clients | None = None) -> None:
        addresses = [node.address for node in self.nodes]
        self.pools.append(TakingTurns(addresses))
        port = int(self.address.rpartition(":")[2]) if self.gateways else 0
        gateway = killable_gateway(
            self.checkpoint.config, self.pools[-1], addresses=addresses[::-1], clients=clients, port=port
        )
        self.gateways.append(await self.stack.enter_async_context(gateway))

    async def kill(self) -> None:
        await self.gateways[-1].kill()


@pytest.fixture
async def make(checkpoint: Checkpoint, prefill: PrefillNode) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def site(*, num_nodes: int = 1, **options: Any) -> Site:
            nodes = [
                await stack.enter_async_context(decode_node(str(checkpoint.path), [prefill.address], **options))
                for _ in range(num_nodes)
            ]
            made = Site(checkpoint, nodes, await stack.enter_async_context(AsyncExitStack()))
            await made.start()
            return made

        yield site


async def ask(kind: str, address: str, **options: Any) -> list[Event]:
    def blocking() -> list[Event]:
        with Client(address) as client:
            return list(client.generate(**(OPTIONS | options)))

    async with asyncio.timeout(LIMIT_S):
        if kind == "blocking":
            return await asyncio.to_thread(blocking)
        async with AsyncClient(address) as client:
            return [event async for event in client.generate(**(OPTIONS | options))]


def at_step(number: int) -> Callable[..., bool]:
    """Before a decode step of that number, counted over all engines from 0."""
    steps = iter(range(-number, 1 << 30))
    return lambda *_: next(steps) == 0


async def until_orphaned(site: Site) -> None:
    """Wait until a node has noticed that nobody reads its answer."""
    async with asyncio.timeout(LIMIT_S):
        while not any(answer.expiry for node in site.nodes for answer in node.answers._by_key.values()):
            await asyncio.sleep(0.01)


async def lose_at(gate: Gate, site: Site) -> None:
    await gate.until_reached()
    await site.kill()
    await until_orphaned(site)
    await site.start()
    gate.open()


def count(site: Site, name: str, **labels: str) -> float | None:
    return site.gateways[-1].metrics.get_sample_value(name, labels)


def gateways_lost(events: list[Event]) -> bool:
    return any(isinstance(event, Reconnecting) for event in events)


@pytest.mark.parametrize("kind", ["blocking", "async"])
@pytest.mark.parametrize("num_steps", [0, 7])
async def test_the_next_gateway_brings_the_rest_of_the_answer(
    make: Callable[..., Any], kind: str, num_steps: int
) -> None:
    """Bug: the requests of a gateway that was killed were lost."""
    site = await make(num_nodes=2, orphan_s=FOR_EVER_S)
    undisturbed = await ask("async", site.address)
    with gate_before(DecodeEngine, "step", at_step(num_steps)) as gate:
        asking = asyncio.create_task(ask(kind, site.address))
        await lose_at(gate, site)
        events = await asking
    assert_same_answer(events, undisturbed)
    assert gateways_lost(events)
    assert [type(event) for event in events].count(Accepted) == 1
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.usage.num_kv_streams, end.usage.num_prefill_tokens) == (1, len(PROMPT) - 1)
    assert site.pools[-1].lent == [], "the request was submitted again"
    assert count(site, "colm_requests_resumed_total", outcome="complete") == 1
    assert count(site, "colm_requests_continued_total") == 0


@pytest.mark.parametrize("kind", ["blocking", "async"])
async def test_a_gateway_that_stops_hands_its_answer_to_one_that_listens_beside_it(
    make: Callable[..., Any], kind: str
) -> None:
    site = await make(orphan_s=FOR_EVER_S)
    undisturbed = await ask("async", site.address)
    with gate_before(DecodeEngine, "step", at_step(7)) as gate:
        asking = asyncio.create_task(ask(kind, site.address))
        await gate.until_reached()
        last = site.gateways[-1]
        await site.start()
        assert site.address == last.address
        stopping = asyncio.create_task(last.server.stop(LIMIT_S))
        await last.front_door.drain(0.0)
        await until_orphaned(site)
        gate.open()
        assert_same_answer(events := await asking, undisturbed)
        await stopping
    assert gateways_lost(events)
    assert site.pools[-1].lent == [], "the request was submitted again"


@pytest.mark.parametrize("kind", ["blocking", "async"])
async def test_a_request_that_begins_while_a_known_gateway_is_gone_waits_for_the_next_one(
    make: Callable[..., Any], kind: str
) -> None:
    """Bug: only a request that had reached the gateway itself looked for the next one, not one of a client that had."""
    site = await make()
    is_gone, events = asyncio.Event(), list[Event]()

    def blocking(loop: asyncio.AbstractEventLoop) -> None:
        with Client(site.address) as client:
            list(client.generate(**OPTIONS))
            asyncio.run_coroutine_threadsafe(site.kill(), loop).result(LIMIT_S)
            for event in client.generate(**OPTIONS):
                loop.call_soon_threadsafe(is_gone.set)
                events.append(event)

    async def ask_twice() -> None:
        if kind == "blocking":
            return await asyncio.to_thread(blocking, asyncio.get_running_loop())
        async with AsyncClient(site.address) as client:
            _ = [event async for event in client.generate(**OPTIONS)]
            await site.kill()
            async for event in client.generate(**OPTIONS):
                is_gone.set()
                events.append(event)

    async with asyncio.timeout(LIMIT_S):
        asking = asyncio.create_task(ask_twice())
        await asyncio.wait([asking, waiting := asyncio.create_task(is_gone.wait())], return_when="FIRST_COMPLETED")
        waiting.cancel()
        await site.start()
        await asking
    assert isinstance(events[0], Reconnecting)
    assert_same_answer(events, await ask("async", site.address))


async def test_a_gateway_that_is_lost_during_the_prefill_costs_no_work(make: Callable[..., Any]) -> None:
    site = await make(orphan_s=FOR_EVER_S)
    with gate_before(PrefillEngine, "step") as gate:
        asking = asyncio.create_task(ask("async", site.address))
        await lose_at(gate, site)
        events = await asking
    assert site.pools[-1].lent == []
    assert_same_answer(events, await ask("async", site.address))


async def test_an_answer_that_is_no_longer_held_is_made_anew_behind_what_the_client_has(
    make: Callable[..., Any],
) -> None:
    site = await make(orphan_s=0.01)
    undisturbed = await ask("async", site.address)
    with gate_before(DecodeEngine, "step", at_step(7)) as gate:
        asking = asyncio.create_task(ask("async", site.address))
        await gate.until_reached()
        await site.kill()
        gate.open()
        await until_idle(site.nodes[0])
        await site.start()
        events = await asking
    assert_same_answer(events, undisturbed)
    assert gateways_lost(events)
    assert len(site.pools[-1].lent) == 1


async def test_gateway_and_decode_node_may_be_lost_together(make: Callable[..., Any]) -> None:
    site = await make(num_nodes=2, orphan_s=FOR_EVER_S)
    undisturbed = await ask("async", site.address)
    site.pools[-1].lent.clear()
    with gate_before(DecodeEngine, "step", at_step(7)) as gate:
        asking = asyncio.create_task(ask("async", site.address))
        await gate.until_reached()
        await site.kill()
        lost = site.nodes.pop(0)
        await lost._server.stop(0)
        await lost.answers.close()
        gate.open()
        await site.start()
        events = await asking
    assert_same_answer(events, undisturbed)


async def test_a_request_that_is_cancelled_is_not_held_for_its_client(make: Callable[..., Any]) -> None:
    site = await make(orphan_s=FOR_EVER_S)
    async with AsyncClient(site.address) as client, aclosing(client.generate(**OPTIONS)) as events:
        async for event in events:
            if isinstance(event, Token):
                break
    await until_idle(site.nodes[0])


async def test_a_client_that_does_not_reconnect_is_told_and_its_answer_ends_with_its_call(
    make: Callable[..., Any],
) -> None:
    site = await make(orphan_s=FOR_EVER_S)
    with gate_before(DecodeEngine, "step", at_step(3)) as gate:

        async def read() -> None:
            async with AsyncClient(site.address, reconnects=False) as client:
                async for _ in client.generate(**OPTIONS):
                    pass

        asking = asyncio.create_task(read())
        await gate.until_reached()
        await site.kill()
        gate.open()
        with pytest.raises(ConnectionLost):
            await asking
    await until_idle(site.nodes[0])


class Named(Clients):
    """Callers are who they say they are."""

    def __init__(self) -> None:
        super().__init__(None)
        self._by_digest = {"": NamedClient(name="any", sha256="")}  # nobody's token is revoked

    def of(self, token: str) -> NamedClient | None:
        return NamedClient(name=token or "operator", sha256="")


async def resume(address: str, key: str, num_tokens: int, client: str) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(resume=pb.ResumeGenerate(answer_key=key, num_tokens=num_tokens))
    async with open_channel(address, Security()) as channel:
        call = GenerationServiceStub(channel).Generate(
            iter([request]), metadata=(("authorization", f"Bearer {client}"),), timeout=LIMIT_S
        )
        with Outcome(call).errors("gateway"):
            return [response async for response in call]


async def test_only_the_client_that_asked_may_have_the_rest(make: Callable[..., Any]) -> None:
    """Nor may it ask for tokens that are not there yet, which would hide those in between."""
    site = await make(orphan_s=FOR_EVER_S)
    await site.kill()
    await site.start(Named())
    key = "0123456789abcdef" * 2
    opened = pb.OpenGenerate(answer_key=key, max_new_tokens=9, num_chains=1)  # a token a step: nothing is drafted
    opened.sampling.ignore_eos = True
    parts = [pb.GenerateRequest(open=opened)]
    parts.append(pb.GenerateRequest(token_ids={"ids": PROMPT}))
    parts.append(pb.GenerateRequest(end_of_prompt={}))
    with gate_before(DecodeEngine, "step", at_step(3)) as gate:
        async with open_channel(site.address, Security()) as channel:
            call = GenerationServiceStub(channel).Generate(iter(parts), metadata=(("authorization", "Bearer ann"),))
            await gate.until_reached()
            await site.kill()
            with pytest.raises(ConnectionLost), Outcome(call).errors("gateway"):
                _ = [response async for response in call]
        await until_orphaned(site)
        await site.start(Named())
        with pytest.raises(UnknownAnswer):
            await resume(site.address, key, 0, "bob")
        with pytest.raises(UnknownAnswer):
            await resume(site.address, key, 4, "ann")
        with pytest.raises(InvalidRequest, match="answer_key='guess'"):
            await resume(site.address, "guess", 0, "ann")
        gate.open()
        responses = await resume(site.address, key, 2, "ann")
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["accepted", *["token"] * 7, "finished"]
    assert responses[0].accepted.num_prompt_tokens == len(PROMPT)
