"""The client: a document goes in, events come out."""

import io
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypedDict, Unpack

import grpc

from colm.errors import InvalidRequest
from colm.events import Event, Finished, Token
from colm.nodes import ClusterStatus
from colm.sampling import SamplingParams
from colm.wire.convert import cluster_status_from_pb, event_from_pb, sampling_to_pb, token_id_pieces
from colm.wire.endpoint import open_blocking_channel, open_channel
from colm.wire.security import Security
from colm.wire.status import error_of
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub

Document = str | bytes | Path | BinaryIO
"""Text, its UTF-8 bytes, a file to read, or an open binary file."""

DEFAULT_ADDRESS = "127.0.0.1:50051"
_PIECE_BYTES = 256 << 10
# The server answers its own deadline with a message that says where the time went; the call waits for that.
_DEADLINE_SLACK_S = 5.0
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


@dataclass(frozen=True, kw_only=True)
class _Upload:
    """One request on its way out. An error of the document is kept: gRPC would only say that there was one."""

    opened: pb.OpenGenerate
    document: Document
    token_ids: Sequence[int]
    failures: list[Exception] = field(default_factory=list)

    def __iter__(self) -> Iterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(open=self.opened)
        try:
            for piece in _pieces(self.document):
                yield pb.GenerateRequest(document=piece)
        except OSError as err:
            self.failures.append(err)
            raise
        for ids in token_id_pieces(self.token_ids):
            yield pb.GenerateRequest(token_ids=ids)

    async def requests(self) -> AsyncIterator[pb.GenerateRequest]:
        for request in self:
            yield request

    @contextmanager
    def errors(self, address: str) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as err:
            if self.failures:
                raise self.failures[0] from err
            raise error_of(err, f"gateway {address}") from err


class GenerateOptions(TypedDict, total=False):
    """Options of `generate`; what is left out takes the cluster's default."""

    token_ids: Sequence[int]
    """The whole prompt as ids, instead of document and prompt."""
    model: str
    """Default: the model the cluster serves."""
    chat: bool | None
    """Wrap in the model's chat template. Default: if the model has one."""
    num_chains: int | None
    """Scale of the answer, 1..n. Default: all chains."""
    max_new_tokens: int | None
    sampling: SamplingParams
    """Default: greedy."""
    timeout_s: float | None
    """Seconds until the answer is worthless."""


def _upload(document: Document, prompt: str, options: GenerateOptions) -> _Upload:
    opened = pb.OpenGenerate(
        model=options.get("model", ""),
        prompt=prompt,
        sampling=sampling_to_pb(options.get("sampling", SamplingParams())),
    )
    for name in ("chat", "num_chains", "max_new_tokens", "timeout_s"):
        value = options.get(name)
        if value is not None:
            try:
                setattr(opened, name, value)
            except (TypeError, ValueError) as err:
                raise InvalidRequest(name, value, str(err)) from err
    return _Upload(opened=opened, document=document, token_ids=options.get("token_ids", ()))


def _pieces(document: Document) -> Iterator[bytes]:
    if isinstance(document, Path):
        with document.open("rb") as opened:
            yield from _pieces(opened)
        return
    if isinstance(document, str):
        document = document.encode()
    file: BinaryIO = io.BytesIO(document) if isinstance(document, bytes) else document
    while piece := file.read(_PIECE_BYTES):
        yield piece


def _call_timeout_s(opened: pb.OpenGenerate) -> float | None:
    if opened.HasField("timeout_s") and opened.timeout_s > 0:
        return opened.timeout_s + _DEADLINE_SLACK_S
    return None


class Client:
    """Blocking client of a cluster's gateway. Use it as a context manager, or `close` it."""

    def __init__(self, address: str = DEFAULT_ADDRESS, security: Security | None = None) -> None:
        self.address = address
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
        self._channel.close()

    def generate(
        self, document: Document = "", prompt: str = "", **options: Unpack[GenerateOptions]
    ) -> Generator[Event]:
        """Submit a document with an instruction and yield what happens.

        Args:
            document: uploaded in pieces; a path is read as it is sent.
            prompt: the instruction that follows the document.
            options: see `GenerateOptions`.

        Yields:
            Accepted, PrefillProgress, Token and, last, one Finished. Closing the generator cancels the request.

        Raises:
            ColmError: the one reason why there is no answer; `InvalidRequest` names the field at fault.
        """
        upload = _upload(document, prompt, options)
        call = self._stub.Generate(
            iter(upload), metadata=self._security.metadata(), timeout=_call_timeout_s(upload.opened)
        )
        try:
            with upload.errors(self.address):
                for message in call:
                    yield event_from_pb(message)
        finally:
            call.cancel()

    def cluster_status(self) -> ClusterStatus:
        """Models, nodes and load, as the gateway knows them."""
        try:
            message = self._stub.GetClusterStatus(
                pb.GetClusterStatusRequest(), metadata=self._security.metadata(), timeout=_STATUS_TIMEOUT_S
            )
        except grpc.RpcError as err:
            raise error_of(err, f"gateway {self.address}") from err
        return cluster_status_from_pb(message)


class AsyncClient:
    """The same for asyncio. Create it on the event loop that uses it."""

    def __init__(self, address: str = DEFAULT_ADDRESS, security: Security | None = None) -> None:
        self.address = address
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
        await self._channel.close()

    async def generate(
        self, document: Document = "", prompt: str = "", **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event]:
        """As `Client.generate`; close it with `contextlib.aclosing` to cancel."""
        upload = _upload(document, prompt, options)
        call = self._stub.Generate(
            upload.requests(), metadata=self._security.metadata(), timeout=_call_timeout_s(upload.opened)
        )
        try:
            with upload.errors(self.address):
                async for message in call:
                    yield event_from_pb(message)
        finally:
            call.cancel()

    async def cluster_status(self) -> ClusterStatus:
        """Models, nodes and load, as the gateway knows them."""
        try:
            message = await self._stub.GetClusterStatus(
                pb.GetClusterStatusRequest(), metadata=self._security.metadata(), timeout=_STATUS_TIMEOUT_S
            )
        except grpc.RpcError as err:
            raise error_of(err, f"gateway {self.address}") from err
        return cluster_status_from_pb(message)
