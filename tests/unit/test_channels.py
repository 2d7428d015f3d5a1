"""Channels between nodes outlive calls; a lost one fails only the calls that were on it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from colm.errors import CapacityExceeded, ColmError, InvalidRequest, PeerFailed, PeerUnavailable
from colm.wire import channels as channels_module
from colm.wire import endpoint
from colm.wire.channels import BlockingChannels, Channels
from colm.wire.endpoint import bind, create_server
from colm.wire.outcome import Outcome
from colm.wire.security import Security, new_tls, new_token
from colm.wire.status import answering, rpc_errors
from colm.wire.tile_codec import pull_kv_handlers, pull_kv_stub
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from tests.gates import LIMIT_S
from tests.relay import Relay, relay

SECURITY = Security(token=new_token(), tls=new_tls())
STALLED_BYTES = 4 << 20


class Answers:
    """Answers as a call's transfer id says: at once, with a refusal, with megabytes, or when the test allows it."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def pull_kv(self, requests: AsyncIterator[pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        async with answering(context, "pull_kv"):
            match (await anext(aiter(requests))).open.transfer_id:
                case "refuse":
                    raise CapacityExceeded("full")
                case "much":
                    for _ in range(STALLED_BYTES >> 16):
                        await context.write(bytes(1 << 16))
                case "wait":
                    await context.write(b"begun")
                    await self.may_answer.wait()
                    await context.write(b"answer")
                case _:
                    await context.write(b"answer")


@asynccontextmanager
async def serving(answers: Answers | None = None, security: Security = SECURITY) -> AsyncIterator[str]:
    server = create_server(security)
    server.add_generic_rpc_handlers((pull_kv_handlers((answers or Answers()).pull_kv),))
    port = bind(server, "127.0.0.1", 0, security)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.fixture
async def peer() -> AsyncIterator[Relay]:
    """A relay in front of a server that itself never stops."""
    async with serving() as address, relay(address) as standing:
        yield standing


def asked(transfer_id: str) -> list[pb.PullKvRequest]:
    return [pb.PullKvRequest(open=pb.OpenKvTransfer(transfer_id=transfer_id))]


Ask = Callable[[str, str], Awaitable[list[bytes]]]
"""(address, transfer id) -> messages."""


@pytest.fixture(params=["aio", "blocking"])
async def ask(request: pytest.FixtureRequest) -> AsyncIterator[Ask]:
    shared, for_threads = Channels(SECURITY), BlockingChannels(SECURITY)

    async def on_the_loop(address: str, transfer_id: str) -> list[bytes]:
        async with shared.use(address) as channel:
            call = pull_kv_stub(channel)(iter(asked(transfer_id)), metadata=SECURITY.metadata(), timeout=LIMIT_S)
            with Outcome(call).errors("peer"):
                return [message async for message in call]

    def in_a_thread(address: str, transfer_id: str) -> list[bytes]:
        with for_threads.use(address) as channel, rpc_errors("peer"):
            return [*pull_kv_stub(channel)(iter(asked(transfer_id)), metadata=SECURITY.metadata(), timeout=LIMIT_S)]

    async def threaded(address: str, transfer_id: str) -> list[bytes]:
        return await asyncio.to_thread(in_a_thread, address, transfer_id)

    yield on_the_loop if request.param == "aio" else threaded
    await shared.close()
    for_threads.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_calls_to_one_address_share_one_connection(peer: Relay, ask: Ask) -> None:
    """Bug: each call made a connection of its own, with its own TLS handshake."""
    for _ in range(5):
        assert await ask(peer.address, "now") == [b"answer"]
    await asyncio.gather(*[ask(peer.address, "now") for _ in range(5)])
    assert peer.num_accepted == 1


async def test_a_refusal_is_no_reason_to_connect_again(peer: Relay, ask: Ask) -> None:
    for _ in range(3):
        with pytest.raises(CapacityExceeded):
            await ask(peer.address, "refuse")
    assert peer.num_accepted == 1


@pytest.mark.parametrize(("field", "kind"), [("end_of_prompt", PeerUnavailable), ("num_chains", InvalidRequest)])
async def test_a_refusal_of_what_was_not_sent_is_a_lost_peer(field: str, kind: type[ColmError]) -> None:
    """Bug: a frame of a prompt that was lost between members was its client's error."""
    shared, for_threads = Channels(SECURITY), BlockingChannels(SECURITY)
    error = InvalidRequest(field, None, "refused")
    with pytest.raises(kind) as raised:
        async with shared.use("127.0.0.1:9"):
            raise error
    with pytest.raises(kind) as again, for_threads.use("127.0.0.1:9"):
        raise error
    assert type(raised.value) is type(again.value) is kind
    await shared.close()
    for_threads.close()


async def test_a_peer_that_was_gone_is_called_again_without_delay(peer: Relay, ask: Ask) -> None:
    """A channel that failed to connect waits before it tries again, longer each time, and fails its calls meanwhile."""
    for num_lost in range(1, 4):
        assert await ask(peer.address, "now") == [b"answer"]
        await peer.vanish()
        for _ in range(num_lost):
            with pytest.raises(PeerUnavailable):
                await ask(peer.address, "now")
        await peer.start()
        assert await ask(peer.address, "now") == [b"answer"]


async def test_a_channel_does_not_wait_as_its_lost_predecessor_does() -> None:
    """Bug: gRPC gave both channels the same connection and its backoff, as long as somebody held the first."""
    shared = Channels(Security())

    async def ask(address: str) -> bytes:
        async with shared.use(address) as channel:
            call = pull_kv_stub(channel)(iter(asked("now")), timeout=LIMIT_S)
            with Outcome(call).errors("peer"):
                message: bytes = await call.read()
        return message

    async with serving(security=Security()) as address, relay(address) as peer, shared.use(peer.address):
        await ask(peer.address)
        await peer.vanish()
        for _ in range(3):
            with pytest.raises(PeerUnavailable):
                await ask(peer.address)
        await peer.start()
        assert await ask(peer.address) == b"answer"
    await shared.close()


async def test_a_connection_that_broke_costs_at_most_the_call_that_finds_out(peer: Relay, ask: Ask) -> None:
    """Most breaks are noticed before the next call; one that is not fails only that call."""
    for _ in range(20):
        try:
            answer = await ask(peer.address, "now")
        except PeerUnavailable:
            answer = await ask(peer.address, "now")
        assert answer == [b"answer"]
        await peer.vanish()
        await peer.start()


@pytest.mark.parametrize("error", [PeerUnavailable("lost"), PeerFailed("illegal header")], ids=["lost", "damaged"])
async def test_a_lost_channel_is_not_closed_under_its_other_users(error: ColmError) -> None:
    """Bug: one whose header table was damaged failed every call, and was kept."""
    shared, answers = Channels(SECURITY), Answers()

    async def lose(address: str) -> None:
        async with shared.use(address):
            raise error

    async with serving(answers) as address, relay(address) as peer:
        async with shared.use(peer.address) as channel:
            call = pull_kv_stub(channel)(iter(asked("wait")), metadata=SECURITY.metadata(), timeout=LIMIT_S)
            assert await call.read() == b"begun"
            with pytest.raises(type(error)):
                await lose(peer.address)
            async with shared.use(peer.address) as successor:
                assert successor is not channel
            answers.may_answer.set()
            assert await call.read() == b"answer"
        assert channel._channel.closed()
        assert not successor._channel.closed()
        await shared.close()
        assert successor._channel.closed()


async def test_a_connection_without_calls_is_closed_and_opened_again(
    peer: Relay, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "IDLE_MS", 1000)
    assert await ask(peer.address, "now") == [b"answer"]
    await until(lambda: not peer.num_open)
    assert await ask(peer.address, "now") == [b"answer"]
    assert peer.num_accepted == 2


async def test_channels_that_nobody_uses_are_bounded_and_the_longest_unused_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels_module, "MAX_UNUSED", 2)
    shared = Channels(SECURITY)
    async with AsyncExitStack() as stack:
        held = await stack.enter_async_context(shared.use("127.0.0.1:9"))
        used = []
        for port in (1, 2, 1, 3):
            async with shared.use(f"127.0.0.1:{port}") as channel:
                used.append(channel)
        first, second, again, third = used
        assert again is first
        assert [channel._channel.closed() for channel in (held, first, second, third)] == [False, False, True, False]
    await shared.close()
    assert all(channel._channel.closed() for channel in (held, first, third))


async def test_a_reader_that_does_not_read_holds_no_other_stream_up(peer: Relay) -> None:
    """All streams of a connection share one flow-control window of HTTP/2."""
    shared = Channels(SECURITY)
    async with shared.use(peer.address) as channel:
        stub = pull_kv_stub(channel)
        stalled = [stub(iter(asked("much")), metadata=SECURITY.metadata(), timeout=LIMIT_S) for _ in range(4)]
        for call in stalled:
            await call.wait_for_connection()
        other = stub(iter(asked("much")), metadata=SECURITY.metadata(), timeout=LIMIT_S)
        assert len([message async for message in other]) == STALLED_BYTES >> 16
        for call in stalled:
            assert len([message async for message in call]) == STALLED_BYTES >> 16
    assert peer.num_accepted == 1
    await shared.close()
