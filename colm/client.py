"""The client: a document goes in, events come out, whatever becomes of the gateway meanwhile."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, Unpack

from colm import defaults
from colm.errors import ColmError
from colm.events import Event, Finished, Token
from colm.generation import AsyncGeneration, Generation
from colm.nodes import ClusterStatus
from colm.reconnect import Attempts, KnownGateway
from colm.scale import Changing, ScaleWish
from colm.upload import Document, GenerateOptions, made, takes_time
from colm.wire.call_end import hear_end
from colm.wire.endpoint import open_blocking_channel, open_channel
from colm.wire.messages import cluster_status_from_pb, event_from_pb
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.status import rpc_errors
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub

DEFAULT_ADDRESS = f"127.0.0.1:{defaults.GATEWAY_PORT}"
_STATUS_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A finished answer, whole."""

    text: str
    tokens: tuple[Token, ...]
    finished: Finished


def collect(events: Iterable[Event]) -> Answer:
    """Read an answer to its end.

    Raises:
        ColmError: whatever the request failed with.
    """
    tokens: list[Token] = []
    for event in events:
        if isinstance(event, Token):
            tokens.append(event)
        elif isinstance(event, Finished):
            text = "".join(token.text for token in tokens) + event.text
            return Answer(text=text, tokens=tuple(tokens), finished=event)
    raise AssertionError("a stream of events ends with Finished or raises")


class Client:
    """Blocking client of a cluster's gateway. Use it as a context manager, or `close` it.

    Args:
        address: of the gateway, host:port.
        security: token and TLS; None for a gateway without.
        reconnects: go on with an answer whose gateway was lost, once it is back; else that is an error.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, security: Security | None = None, *, reconnects: bool = True
    ) -> None:
        self.address = address
        self._reconnects = reconnects
        self._gateway = KnownGateway()
        self._closed = threading.Event()
        self._peer = f"gateway {address}"
        self._security = security or Security()
        self._channel = open_blocking_channel(address, self._security)
        self._stub = GenerationServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._closed.set()
        self._channel.close()

    def generate(self, document: Document = "", prompt: str = "", **options: Unpack[GenerateOptions]) -> Generation:
        """Submit a document with an instruction and iterate over what happens; the first step submits it.

        Args:
            document: uploaded in pieces; a file is read as it is sent, its first piece before the call is opened.
            prompt: the instruction that follows the document.
            options: see `GenerateOptions`.

        Returns:
            An iterator over Accepted, PrefillProgress, Token and, last, one Finished; Reconnecting where the gateway
            was lost. Closing it cancels the request. It raises a `ColmError`, the one reason why there is no answer;
            `InvalidRequest` names the field at fault.
        """
        scale: Changing[ScaleWish | None] = Changing(None)

        def events() -> Generator[Event]:
            attempts = Attempts(
                document, prompt, options, scale=scale, reconnects=self._reconnects, gateway=self._gateway
            )
            while not (yield from self._call(attempts)):
                pass

        return Generation(events(), scale)

    def _call(self, attempts: Attempts) -> Generator[Event, None, bool]:
        """Make one call, and yield what is news; returns whether the answer is complete."""

        def messages(changes: Iterator[object]) -> Iterator[pb.GenerateRequest]:
            yield from attempts.messages
            for _ in changes:
                yield from attempts.change

        with attempts.scale.followed_in_thread() as changes:
            call = self._stub.Generate(
                messages(changes), metadata=self._security.metadata(), timeout=attempts.call_timeout_s
            )
            hear_end(call)
            try:
                with attempts.errors(), rpc_errors(self._peer):
                    for message in call:
                        if (event := attempts.see(event_from_pb(message))) is not None:
                            yield event
                return True
            except ColmError as err:
                if self._closed.is_set():
                    raise
                lost = attempts.after(err)
            finally:
                call.cancel()
        yield lost
        self._closed.wait(lost.in_s)
        return False

    def cluster_status(self) -> ClusterStatus:
        """Models, nodes and load, as the gateway knows them."""
        with rpc_errors(self._peer):
            message = self._stub.GetClusterStatus(
                pb.GetClusterStatusRequest(), metadata=self._security.metadata(), timeout=_STATUS_TIMEOUT_S
            )
        self._gateway.was_there = True
        return cluster_status_from_pb(message)


class AsyncClient:
    """`Client` for asyncio. Create it on the event loop that uses it."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, security: Security | None = None, *, reconnects: bool = True
    ) -> None:
        self.address = address
        self._reconnects = reconnects
        self._gateway = KnownGateway()
        self._is_closed = False
        self._peer = f"gateway {address}"
        self._security = security or Security()
        self._channel = open_channel(address, self._security)
        self._stub = GenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._is_closed = True
        await self._channel.close()

    def generate(
        self, document: Document = "", prompt: str = "", **options: Unpack[GenerateOptions]
    ) -> AsyncGeneration:
        """As `Client.generate`; close it with `contextlib.aclosing` to cancel."""
        scale: Changing[ScaleWish | None] = Changing(None)
        return AsyncGeneration(self._events(document, prompt, options, scale), scale)

    async def _events(
        self, document: Document, prompt: str, options: GenerateOptions, scale: Changing[ScaleWish | None]
    ) -> AsyncGenerator[Event]:
        begin = partial(
            Attempts, document, prompt, options, scale=scale, reconnects=self._reconnects, gateway=self._gateway
        )
        in_thread = takes_time(document, options)
        attempts = await asyncio.to_thread(begin) if in_thread else begin()

        async def messages(changes: AsyncIterator[object]) -> AsyncIterator[pb.GenerateRequest]:
            async for message in made(attempts.messages, in_thread=in_thread):
                yield message
            async for _ in changes:
                for message in attempts.change:
                    yield message

        while True:
            with scale.followed() as changes:
                call = self._stub.Generate(
                    messages(changes), metadata=self._security.metadata(), timeout=attempts.call_timeout_s
                )
                outcome = Outcome(call)
                try:
                    with attempts.errors(), outcome.errors(self._peer):
                        async for message in call:
                            if (event := attempts.see(event_from_pb(message))) is not None:
                                yield event
                    return
                except ColmError as err:
                    if self._is_closed:
                        raise
                    lost = attempts.after(err)
                finally:
                    call.cancel()
            yield lost
            await asyncio.sleep(lost.in_s)

    async def cluster_status(self) -> ClusterStatus:
        """Models, nodes and load, as the gateway knows them."""
        call = self._stub.GetClusterStatus(
            pb.GetClusterStatusRequest(), metadata=self._security.metadata(), timeout=_STATUS_TIMEOUT_S
        )
        with Outcome(call).errors(self._peer):
            message = await call
        self._gateway.was_there = True
        return cluster_status_from_pb(message)
