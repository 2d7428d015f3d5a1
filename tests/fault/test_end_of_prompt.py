"""Work starts at `end_of_prompt`, whatever the caller does with its side of the call then, and never before."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.errors import ColmError, DeadlineExceeded, InvalidRequest
from colm.wire import prompt_stream
from colm.wire.endpoint import open_channel
from colm.wire.messages import token_id_pieces
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.tile_codec import decode_message, pull_kv_stub
from colm.wire.v1 import common_pb2
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1 import kv_transfer_service_pb2 as kv_pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from prefill_node.engine import PrefillEngine
from tests.gates import LIMIT_S, gate_before
from tests.gateway import TakingTurns, gateway
from tests.nodes import decode_node, decode_requests, prefill_node, pull_kv_requests
from tests.tiny import tiny_checkpoint

PROMPT = list(range(5, 65))


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One service at its address: how it is called, and what of."""

    address: str
    stub: Callable[[grpc.aio.Channel], Any]
    requests: Sequence[Any]
    """`open`, the prompt, `end_of_prompt`."""
    event: Callable[[Any], str | None]
    """The name of the event in a response."""
    last_event: str
    last_words: Sequence[Any] = ()
    """What the caller has to say to the last event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """All three services, one behind the other."""

    services: dict[str, Served]
    pool: TakingTurns


def generate_requests() -> list[pb.GenerateRequest]:
    return [
        pb.GenerateRequest(open=pb.OpenGenerate(max_new_tokens=4)),
        *(pb.GenerateRequest(token_ids=piece) for piece in token_id_pieces(np.array(PROMPT))),
        pb.GenerateRequest(end_of_prompt=common_pb2.EndOfPrompt()),
    ]


def event(response: Any) -> str | None:
    name: str | None = response.WhichOneof("event")
    return name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def cluster(checkpoint: Checkpoint) -> AsyncIterator[Cluster]:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as decode:
        pool = TakingTurns([decode.address])
        async with gateway(checkpoint.config, pool) as address:
            services = {
                "gateway": Served(
                    address=address,
                    stub=lambda channel: GenerationServiceStub(channel).Generate,
                    requests=generate_requests(),
                    event=event,
                    last_event="finished",
                ),
                "decode node": Served(
                    address=decode.address,
                    stub=lambda channel: DecodeServiceStub(channel).Decode,
                    requests=decode_requests(PROMPT),
                    event=event,
                    last_event="finished",
                ),
                "prefill node": Served(
                    address=prefill.address,
                    stub=pull_kv_stub,
                    requests=pull_kv_requests(prefill, PROMPT),
                    event=lambda data: event(decode_message(data)[0]),
                    last_event="complete",
                    last_words=[kv_pb.PullKvRequest(acknowledged=kv_pb.KvPosition(layer=checkpoint.config.num_layers))],
                ),
            }
            yield Cluster(services=services, pool=pool)


@pytest.fixture(params=["gateway", "decode node", "prefill node"])
def served(request: pytest.FixtureRequest, cluster: Cluster) -> Served:
    return cluster.services[request.param]


async def refusal(served: Served, requests: Sequence[Any]) -> ColmError:
    """What a call fails with that sends these and closes its side."""
    async with open_channel(served.address, Security()) as channel:
        call = served.stub(channel)(iter(requests), timeout=LIMIT_S)
        with pytest.raises(ColmError) as caught, Outcome(call).errors("server"):
            async for _ in call:
                pass
    return caught.value


async def test_the_whole_answer_comes_while_the_callers_side_stays_open(served: Served) -> None:
    """Work waited for the caller's side to close; nothing could be said about a request that runs."""
    async with open_channel(served.address, Security()) as channel:
        call = served.stub(channel)(timeout=LIMIT_S)
        for request in served.requests:
            await call.write(request)
        events = []
        async for response in call:
            events.append(served.event(response))
            for request in served.last_words if events[-1] == served.last_event else ():
                await call.write(request)
        # The status is the handler's end: it does not wait for ours either.
        assert await call.code() is grpc.StatusCode.OK
    assert events[-1] == served.last_event


@pytest.mark.parametrize("served", ["gateway", "decode node"], indirect=True)
@pytest.mark.parametrize("part", ["open", None])
async def test_what_follows_the_end_and_is_not_known_is_refused_by_name(served: Served, part: str | None) -> None:
    async with open_channel(served.address, Security()) as channel:
        call = served.stub(channel)(timeout=LIMIT_S)
        with gate_before(PrefillEngine, "step") as gate:
            for request in served.requests:
                await call.write(request)
            await gate.until_reached()
            await call.write(served.requests[0] if part else type(served.requests[0])())
            with pytest.raises(InvalidRequest, match=f"part={part!r}: only `change_scale`"), Outcome(call).errors("it"):
                _ = [response async for response in call]
            gate.open()


async def test_a_side_that_is_closed_before_the_end_was_cut_off_and_starts_nothing(served: Served) -> None:
    """Half a document was answered as if it were the whole."""
    with gate_before(PrefillEngine, "step") as gate:
        gate.open()
        error = await refusal(served, served.requests[:-1])
        assert gate.num_arrived == 0
    assert isinstance(error, InvalidRequest)
    assert error.field == "end_of_prompt"
    assert "cut off" in error.limit


@pytest.mark.parametrize("node", ["decode node", "prefill node"])
async def test_a_prompt_that_stops_coming_is_given_up(
    cluster: Cluster, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: such a call kept its lease until its caller's deadline."""
    served = cluster.services[node]
    monkeypatch.setattr(prompt_stream, "UPLOAD_IDLE_S", 0.05)
    may_go_on = asyncio.Event()

    async def silent() -> AsyncIterator[Any]:
        for request in served.requests[:-1]:
            yield request
        await may_go_on.wait()

    async with open_channel(served.address, Security()) as channel:
        call = served.stub(channel)(silent(), timeout=LIMIT_S)
        with pytest.raises(DeadlineExceeded, match="next piece of the prompt"), Outcome(call).errors("server"):
            async for _ in call:
                pass
        may_go_on.set()


async def test_a_part_that_the_server_does_not_know_is_refused_by_name(served: Served) -> None:
    opened, *rest = served.requests
    error = await refusal(served, [opened, type(opened)(), *rest])
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.value) == ("part", "None")
    assert "`end_of_prompt`" in error.limit


async def test_a_second_open_is_refused_by_name(served: Served) -> None:
    opened, *rest = served.requests
    error = await refusal(served, [opened, opened, *rest])
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.value) == ("part", "'open'")


async def test_a_client_that_vanishes_in_mid_upload_starts_nothing(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC ends what a server reads before it tells that the call is cancelled: half a prompt went to a decode node."""
    served = cluster.services["gateway"]

    async def until_inside(num_requests: int) -> None:
        async with asyncio.timeout(LIMIT_S), AsyncClient(served.address) as client:
            while (await client.cluster_status()).num_active_requests != num_requests:
                await asyncio.sleep(0.01)

    async with open_channel(served.address, Security()) as channel:
        call = served.stub(channel)(timeout=LIMIT_S)
        for request in served.requests[:-1]:
            await call.write(request)
        await until_inside(1)
        call.cancel()
        await until_inside(0)
    assert cluster.pool.lent == []
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
