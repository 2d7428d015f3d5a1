"""A call's end says the same on both ends of the wire, whoever ends it and however it is called."""

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from colm.errors import (
    CapacityExceeded,
    CheckpointError,
    ClusterError,
    ColmError,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    FingerprintMismatch,
    GoingAway,
    InvalidRequest,
    LeaseExpired,
    ModelReplaced,
    PeerFailed,
    PeerUnavailable,
    Unauthenticated,
    UnknownModel,
    UnsupportedModel,
)
from colm.wire.endpoint import bind, create_server, open_blocking_channel, open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.status import answering, error_of
from colm.wire.tile_codec import pull_kv_handlers, pull_kv_stub
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as kv_pb

LIMIT_S = 60.0
PEER = "the peer"


def failing(error: BaseException, num_answers: int = 0) -> Callable[..., object]:
    """Serves `PullKv` with an error, after some answers."""

    async def behaviour(_: AsyncIterator[kv_pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        async with answering(context, "pull_kv"):
            for _ in range(num_answers):
                await context.write(kv_pb.PullKvResponse().SerializeToString())
            raise error

    return behaviour


@asynccontextmanager
async def serving(behaviour: Callable[..., object]) -> AsyncIterator[str]:
    server = create_server(Security())
    server.add_generic_rpc_handlers((pull_kv_handlers(behaviour),))
    port = bind(server, "127.0.0.1", 0, Security())
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def blocking_failure(address: str, timeout_s: float = LIMIT_S) -> ColmError:
    with open_blocking_channel(address, Security()) as channel:
        try:
            for _ in pull_kv_stub(channel)(iter(()), timeout=timeout_s):
                pass
        except grpc.RpcError as err:
            return error_of(err, PEER)
    raise AssertionError("the call succeeded")


async def threaded_failure(address: str, timeout_s: float = LIMIT_S) -> ColmError:
    return await asyncio.to_thread(blocking_failure, address, timeout_s)


async def aio_failure(address: str, timeout_s: float = LIMIT_S) -> ColmError:
    async with open_channel(address, Security()) as channel:
        call = pull_kv_stub(channel)(iter(()), timeout=timeout_s)
        try:
            with Outcome(call).errors(PEER):
                async for _ in call:
                    pass
        except ColmError as err:
            return err
    raise AssertionError("the call succeeded")


CLIENTS = pytest.mark.parametrize("failure", [threaded_failure, aio_failure], ids=["blocking", "aio"])

TYPED: list[ColmError] = [
    LeaseExpired("lease gone"),
    GoingAway("the gateway is stopping"),
    ModelReplaced("this answer began with other weights"),
    InvalidRequest("top_p", 1.5, "must be above 0 and at most 1"),
    InvalidRequest("stop", "ü\n" * 100, "each string must have 1 to 256 characters"),
    UnknownModel("model", "gpt-7", "this cluster serves smollm2"),
    Unauthenticated("the token is wrong"),
    CapacityExceeded("4 of 5 pages are taken; try again later"),
    PeerUnavailable("the prefill node broke off"),
    FingerprintMismatch("this node serves ab, the caller wants cd"),
    DeadlineExceeded("the deadline passed in the queue: 3 s"),
]
UNTYPED: list[ColmError] = [
    ColmError("something of ours"),
    CheckpointError("model.safetensors is truncated"),
    UnsupportedModel("window attention"),
    ConfigError("page_tokens=0"),
    ClusterError("no cluster"),
]


def name_of(error: BaseException) -> str:
    return type(error).__name__


@CLIENTS
@pytest.mark.parametrize("error", TYPED, ids=name_of)
async def test_a_typed_error_arrives_as_itself(error: ColmError, failure: Callable[..., object]) -> None:
    async with serving(failing(error)) as address:
        received = await failure(address)
    assert type(received) is type(error)
    assert str(received) == str(error)


@CLIENTS
async def test_an_invalid_request_arrives_with_its_parts(failure: Callable[..., object]) -> None:
    error = InvalidRequest("max_new_tokens", 0, "must be at least 1")
    async with serving(failing(error)) as address:
        received = await failure(address)
    assert (received.field, received.value, received.limit) == (error.field, error.value, error.limit)


@pytest.mark.parametrize(("said_s", "heard_s"), [(7.25, 7.25), (0.0, 0.0), (-1.0, 1.0), (1e9, 1.0), (math.nan, 1.0)])
async def test_a_refusal_for_want_of_room_arrives_with_its_limit_and_a_time_that_can_be(
    said_s: float, heard_s: float
) -> None:
    error = CapacityExceeded("full", client_limit="max_bytes", retry_after_s=said_s)
    async with serving(failing(error)) as address:
        received = await aio_failure(address)
    assert isinstance(received, CapacityExceeded)
    assert (received.client_limit, received.retry_after_s) == ("max_bytes", heard_s)


@CLIENTS
@pytest.mark.parametrize("error", UNTYPED, ids=name_of)
async def test_an_error_without_a_kind_of_its_own_arrives_with_its_message(
    error: ColmError, failure: Callable[..., object]
) -> None:
    async with serving(failing(error)) as address:
        received = await failure(address)
    assert type(received) is PeerFailed
    assert str(received) == f"{PEER}: INTERNAL: {error}"


@CLIENTS
async def test_an_error_after_some_answers_arrives_too(failure: Callable[..., object]) -> None:
    async with serving(failing(CapacityExceeded("full"), num_answers=3)) as address:
        assert type(await failure(address)) is CapacityExceeded


@CLIENTS
@pytest.mark.parametrize(
    "error",
    [ValueError("secret of /root"), KeyError("secret"), AssertionError("secret"), BaseException("secret panic")],
    ids=name_of,
)
async def test_a_defect_of_ours_is_internal_and_keeps_its_text_at_home(
    error: BaseException, failure: Callable[..., object]
) -> None:
    """Bug: an error that is no `Exception`, such as a panic in Rust, left the call without an answer."""
    async with serving(failing(error)) as address:
        received = await failure(address)
    assert type(received) is PeerFailed
    assert "INTERNAL: internal error in pull_kv" in str(received)
    assert "secret" not in str(received)


@CLIENTS
async def test_a_peer_that_is_not_there_is_unavailable(failure: Callable[..., object]) -> None:
    # Bound and not listening: nobody answers, and no other process can take the port meanwhile.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        received = await failure(f"127.0.0.1:{held.getsockname()[1]}")
    assert type(received) is ConnectionLost
    assert PEER in str(received)


@CLIENTS
async def test_a_call_that_outlives_its_deadline_is_deadline_exceeded(failure: Callable[..., object]) -> None:
    async def stay(_: AsyncIterator[kv_pb.PullKvRequest], __: grpc.aio.ServicerContext) -> None:
        await asyncio.Event().wait()

    async with serving(stay) as address:
        received = await failure(address, timeout_s=0.05)
    assert type(received) is DeadlineExceeded
    assert PEER in str(received)


@CLIENTS
async def test_a_server_that_stops_in_the_middle_is_unavailable(failure: Callable[..., object]) -> None:
    """A call that the server's end breaks off may be tried elsewhere."""
    arrived = asyncio.Event()

    async def stay(_: AsyncIterator[kv_pb.PullKvRequest], __: grpc.aio.ServicerContext) -> None:
        arrived.set()
        await asyncio.Event().wait()

    async with serving(stay) as address:
        call = asyncio.ensure_future(failure(address))
        await asyncio.wait_for(arrived.wait(), LIMIT_S)
    assert type(await call) is ConnectionLost


def test_error_details_of_every_kind_are_known() -> None:
    """A kind added to the .proto file must be added to the table in colm.wire.status."""
    from colm.wire import status

    mapped = {kind for _, _, kind in status._BY_ERROR}
    kinds: Iterator[int] = iter(common_pb2.ErrorDetail.Kind.values())
    unmapped = {common_pb2.ErrorDetail.Kind.Name(kind) for kind in kinds if kind not in mapped}
    assert unmapped == {"KIND_UNSPECIFIED", "KIND_INTERNAL"}


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        ("Stream removed (Unwrap failed (TSI_DATA_CORRUPTED))", ConnectionLost),
        ("Unexpected <class 'KeyError'>", PeerFailed),
    ],
)
def test_a_connection_that_breaks_within_a_tls_record_is_lost_and_no_fault_of_the_peer(
    details: str, kind: type[ColmError]
) -> None:
    """Bug: a client whose connection broke there did not ask for the rest of its answer."""
    nothing = grpc.aio.Metadata()
    assert type(error_of(grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, nothing, nothing, details), PEER)) is kind


@pytest.mark.parametrize("failure", [aio_failure, threaded_failure])
async def test_a_call_whose_first_write_is_cancelled_ends_with_its_error(
    failure: Callable[..., Awaitable[ColmError]],
) -> None:
    """Bug: gRPC's status never followed, and the caller waited for its deadline."""

    async def behaviour(_: AsyncIterator[kv_pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        async with answering(context, "pull_kv"):
            asyncio.get_running_loop().call_soon(handler.cancel)
            with suppress(asyncio.CancelledError):
                await context.write(kv_pb.PullKvResponse().SerializeToString())
            handler.uncancel()
            raise InvalidRequest("part", "x", "is not known here")

    async with serving(behaviour) as address:
        error = await failure(address)
    assert isinstance(error, InvalidRequest), error


async def test_a_caller_that_goes_before_its_call_begins_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: what gRPC says of a caller that has gone was logged as a failure of the node's own."""
    came, began = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def behaviour(_: AsyncIterator[kv_pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        came.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        try:
            async with answering(context, "pull_kv"):
                began.set_result(None)
        except BaseException as error:
            began.set_exception(error)
            raise

    async with serving(behaviour) as address, open_channel(address, Security()) as channel:
        call = pull_kv_stub(channel)(iter(()), timeout=LIMIT_S)
        await asyncio.wait_for(came.wait(), LIMIT_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(began, LIMIT_S)
    assert [record.message for record in caplog.records if "defect" in record.message] == []
