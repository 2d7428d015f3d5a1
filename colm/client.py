"""The client: a document goes in, events come out."""

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from colm import checks
from colm.errors import ColmError, InvalidRequest
from colm.events import Event, Finished, Token
from colm.nodes import ClusterStatus
from colm.request import AttentionMode, ChatMessage, GenerateRequest, KvCodec
from colm.sampling import TOKEN_IDS, SamplingParams
from colm.wire.endpoint import open_blocking_channel, open_channel
from colm.wire.messages import cluster_status_from_pb, event_from_pb, generate_request_to_pb, token_id_pieces
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.status import rpc_errors
from colm.wire.v1 import common_pb2
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub

Document = str | bytes | Path | BinaryIO
"""Text, its UTF-8 bytes, a file to read, or an open binary file."""

DEFAULT_ADDRESS = "127.0.0.1:50051"
_PIECE_BYTES = 256 << 10
# The call's deadline lies this long after the server's own, whose error message says where the time went.
_DEADLINE_SLACK_S = 5.0
# gRPC counts nanoseconds in 64 bits; a deadline that overflows them is over at once.
_LONGEST_CALL_S = 1e9
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


@dataclass(kw_only=True)
class _Upload:
    """The messages of one request. An error of the document is kept here, since gRPC hides its cause."""

    opened: pb.OpenGenerate
    pieces: Iterator[bytes]
    token_ids: NDArray[np.int64]
    failure: InvalidRequest | None = None

    def __iter__(self) -> Iterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(open=self.opened)
        try:
            for piece in self.pieces:
                yield pb.GenerateRequest(document=piece)
        except InvalidRequest as err:
            self.failure = err
            raise
        for ids in token_id_pieces(self.token_ids):
            yield pb.GenerateRequest(token_ids=ids)
        yield pb.GenerateRequest(end_of_prompt=common_pb2.EndOfPrompt())

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise the document's own error, if there was one, in place of the call's."""
        try:
            yield
        except ColmError:
            if self.failure is not None:
                raise self.failure  # noqa: B904 - its cause is the file's own error
            raise

    async def requests(self) -> AsyncIterator[pb.GenerateRequest]:
        """The messages of `__iter__`, made in a thread because reading a file may block."""
        requests = iter(self)
        while (request := await asyncio.to_thread(next, requests, None)) is not None:
            yield request


class GenerateOptions(TypedDict, total=False):
    """Options of `generate`; what is left out takes the cluster's default."""

    token_ids: Sequence[int] | NDArray[np.integer[Any]]
    """The whole prompt as ids, instead of document and prompt."""
    history: tuple[ChatMessage, ...]
    """The conversation before the message that document and prompt are. Default: none."""
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
    attention: AttentionMode
    """`dense`, or `sparse` for long prompts: the prefill skips what each layer's plan finds light. Default: dense."""
    kv_codec: KvCodec
    """`raw`, or `int8`: the prompt's keys and values travel in about half the bytes, rounded. Default: raw."""
    max_draft_tokens: int | None
    """Tokens that chain 1 may draft before all chains verify them; no token changes, and 0 drafts none. Default: the
    decode node's limit."""


def _upload(document: Document, prompt: str, options: GenerateOptions) -> _Upload:
    """Check the whole request and the document's first piece, so that a bad request opens no call.

    Raises:
        InvalidRequest: names the field at fault. The cluster checks its own limits.
    """
    known, given = GenerateOptions.__annotations__, dict[str, Any](options)
    for name, value in given.items():
        if name not in known:
            raise InvalidRequest(name, value, f"is no option of generate; there are {', '.join(known)}")
    token_ids = _token_ids(given.pop("token_ids", ()))
    request = GenerateRequest(prompt=prompt, **given)
    pieces = _pieces(document)
    first = [*islice(pieces, 1)]
    return _Upload(opened=generate_request_to_pb(request), pieces=chain(first, pieces), token_ids=token_ids)


def _token_ids(values: object) -> NDArray[np.int64]:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InvalidRequest("token_ids", values, "must be a sequence of integers")
    limit = "each must be an integer from 0 to 2^32 - 1"
    checked = (checks.integer("token_ids", value, TOKEN_IDS, limit) for value in values)
    return np.fromiter(checked, dtype=np.int64, count=len(values))


def _pieces(document: Document) -> Iterator[bytes]:
    if isinstance(document, str):
        document = checks.utf8("document", document)
    if isinstance(document, bytes):
        document = io.BytesIO(document)
    if not isinstance(document, Path) and not hasattr(document, "read"):
        raise InvalidRequest("document", document, "must be text, its UTF-8 bytes, a Path or an open binary file")
    try:
        with document.open("rb") if isinstance(document, Path) else nullcontext(document) as file:
            for piece in iter(partial(file.read, _PIECE_BYTES), b""):
                if not isinstance(piece, bytes):
                    raise InvalidRequest("document", piece, "must be read as bytes; open the file in binary mode")
                yield piece
    except InvalidRequest:
        raise
    except Exception as err:  # a caller's file may fail in any way
        shown = str(document) if isinstance(document, Path) else document
        reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err) or repr(err)
        raise InvalidRequest("document", shown, f"cannot be read: {reason}") from err


def _call_timeout_s(opened: pb.OpenGenerate) -> float | None:
    if opened.HasField("timeout_s") and opened.timeout_s > 0:
        return min(opened.timeout_s + _DEADLINE_SLACK_S, _LONGEST_CALL_S)
    return None


class Client:
    """Blocking client of a cluster's gateway. Use it as a context manager, or `close` it."""

    def __init__(self, address: str = DEFAULT_ADDRESS, security: Security | None = None) -> None:
        self.address = address
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
        self._channel.close()

    def generate(
        self, document: Document = "", prompt: str = "", **options: Unpack[GenerateOptions]
    ) -> Generator[Event]:
        """Submit a document with an instruction and yield what happens.

        Args:
            document: uploaded in pieces; a file is read as it is sent, its first piece before the call is opened.
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
            with upload.errors(), rpc_errors(self._peer):
                for message in call:
                    yield event_from_pb(message)
        finally:
            call.cancel()

    def cluster_status(self) -> ClusterStatus:
        """Models, nodes and load, as the gateway knows them."""
        with rpc_errors(self._peer):
            message = self._stub.GetClusterStatus(
                pb.GetClusterStatusRequest(), metadata=self._security.metadata(), timeout=_STATUS_TIMEOUT_S
            )
        return cluster_status_from_pb(message)


class AsyncClient:
    """`Client` for asyncio. Create it on the event loop that uses it."""

    def __init__(self, address: str = DEFAULT_ADDRESS, security: Security | None = None) -> None:
        self.address = address
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
        await self._channel.close()

    async def generate(
        self, document: Document = "", prompt: str = "", **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event]:
        """As `Client.generate`; close it with `contextlib.aclosing` to cancel."""
        upload = await asyncio.to_thread(_upload, document, prompt, options)
        call = self._stub.Generate(
            upload.requests(), metadata=self._security.metadata(), timeout=_call_timeout_s(upload.opened)
        )
        outcome = Outcome(call)
        try:
            with upload.errors(), outcome.errors(self._peer):
                async for message in call:
                    yield event_from_pb(message)
        finally:
            call.cancel()

    async def cluster_status(self) -> ClusterStatus:
        """Models, nodes and load, as the gateway knows them."""
        call = self._stub.GetClusterStatus(
            pb.GetClusterStatusRequest(), metadata=self._security.metadata(), timeout=_STATUS_TIMEOUT_S
        )
        with Outcome(call).errors(self._peer):
            message = await call
        return cluster_status_from_pb(message)
