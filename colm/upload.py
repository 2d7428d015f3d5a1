"""A client's request on its way to the gateway: checked, and sent in pieces."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
from numpy.typing import NDArray

from colm import checks
from colm.errors import ColmError, InvalidRequest
from colm.request import AttentionMode, ChatMessage, GenerateRequest, KvCodec
from colm.sampling import TOKEN_IDS, SamplingParams
from colm.scale import ScaleWish
from colm.wire.messages import generate_request_to_pb, scale_to_pb, token_id_pieces
from colm.wire.v1 import common_pb2
from colm.wire.v1 import generation_service_pb2 as pb

Document = str | bytes | Path | BinaryIO
"""Text, its UTF-8 bytes, a file to read, or an open binary file."""

Message = pb.GenerateRequest

_PIECE_BYTES = 256 << 10
SHORT_CHARS, SHORT_TOKENS = 64 << 10, 1024
"""Of a prompt whose messages are made in about half a millisecond."""


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
    min_chains: int | None
    """Fewest chains: the decode node chooses from these to `num_chains` for each token, fewer under load. Default:
    always `num_chains`."""
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
    provisional_first_token: bool
    """Send chain 1's own next token as a `ProvisionalToken` before the first `Token`, where that comes sooner; no token
    changes. Default: no."""


@dataclass(kw_only=True)
class Upload:
    """The messages of one request. An error of the document is kept here, since gRPC hides its cause."""

    request: GenerateRequest
    document: Document
    token_ids: NDArray[np.int64]
    pieces: Iterator[bytes]
    failure: InvalidRequest | None = None
    is_taken: bool = False
    """A message has left, so somebody was there to take it."""

    @classmethod
    def of(cls, document: Document, prompt: str, options: GenerateOptions) -> "Upload":
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
        return cls(request=request, document=document, token_ids=token_ids, pieces=chain(first, pieces))

    def again(self, request: GenerateRequest) -> "Upload | None":
        """The same document with other options; None if it can be read only once."""
        if not isinstance(self.document, str | bytes | Path):
            return None
        return Upload(request=request, document=self.document, token_ids=self.token_ids, pieces=_pieces(self.document))

    def __iter__(self) -> Iterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(open=generate_request_to_pb(self.request))
        self.is_taken = True
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """The one message that asks for the rest of an answer."""

    answer_key: str
    num_tokens: int
    """Tokens that are here."""

    def __iter__(self) -> Iterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(resume=pb.ResumeGenerate(answer_key=self.answer_key, num_tokens=self.num_tokens))


@dataclass(frozen=True, slots=True)
class Change:
    """The message that asks for another scale; none where there is no wish."""

    wish: ScaleWish | None

    def __iter__(self) -> Iterator[Message]:
        if self.wish is not None:
            yield pb.GenerateRequest(change_scale=scale_to_pb(self.wish))


def takes_time(document: Document, options: GenerateOptions) -> bool:
    """Whether an event loop would notice that the messages are made: a file is read, or the prompt is long."""
    if not isinstance(document, str | bytes) or len(document) > SHORT_CHARS:
        return True
    given: object = options.get("token_ids", ())
    num_tokens = given.size if isinstance(given, np.ndarray) else len(given) if isinstance(given, Sequence) else 0
    return num_tokens > SHORT_TOKENS


async def made(messages: Iterator[Message], *, in_thread: bool) -> AsyncIterator[Message]:
    """The messages; made in a thread where that `takes_time`, which costs a way there and back for each."""
    while (message := await asyncio.to_thread(next, messages, None) if in_thread else next(messages, None)) is not None:
        yield message


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
