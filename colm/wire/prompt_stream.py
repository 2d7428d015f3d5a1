"""Reads a call's messages: one `open`, the prompt in pieces, `end_of_prompt`, changes; or something else first."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from colm import defaults
from colm.errors import DeadlineExceeded, InvalidRequest, PeerUnavailable
from colm.scale import ScaleWish
from colm.wire.messages import ids_checksum, scale_wish_from_pb
from colm.wire.v1 import common_pb2 as pb

OPEN_TIMEOUT_S = 10.0
"""Seconds within which a call must send its `open`; until then it takes up one of the server's calls."""

UPLOAD_IDLE_S = defaults.UPLOAD_IDLE_S
MAX_ID_CHARS = 128
"""Of the ids that a call brings, which are written to logs and kept in tables."""

MAX_SALT_BYTES = 64
"""Of what keeps prompts of different clients apart."""

_Open = TypeVar("_Open", covariant=True)
_Part = TypeVar("_Part", bound="PromptPart[object]")


class PromptPart(Protocol[_Open]):
    """What `GenerateRequest`, `DecodeRequest` and `PullKvRequest` have in common."""

    @property
    def open(self) -> _Open:
        """Set in the first message."""

    @property
    def token_ids(self) -> pb.TokenIds:
        """Set in a piece of the prompt."""

    @property
    def end_of_prompt(self) -> pb.EndOfPrompt:
        """Set in its last message."""

    def WhichOneof(self, oneof_group: str, /) -> str | None:
        """Which part is set."""


class RunningPart(Protocol):
    """What `GenerateRequest` and `DecodeRequest` have in common, once the request runs."""

    @property
    def change_scale(self) -> pb.Scale:
        """The only part that may be set."""

    def WhichOneof(self, oneof_group: str, /) -> str | None:
        """Which part is set."""


async def read_first(requests: AsyncIterator[_Part], *others: str) -> _Part:
    """Read the first message of a call, which must be `open` or one of the others.

    Raises:
        InvalidRequest: the call ended before it, or begins with something else.
        DeadlineExceeded: it did not come within `OPEN_TIMEOUT_S`.
    """
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            request = await anext(aiter(requests))
    except StopAsyncIteration as err:
        raise InvalidRequest("part", None, "the call ended before its `open`") from err
    except TimeoutError as err:
        raise DeadlineExceeded(f"the call's `open` did not come within {OPEN_TIMEOUT_S:g} s") from err
    allowed = ("open", *others)
    if (part := request.WhichOneof("part")) not in allowed:
        raise InvalidRequest(
            "part", part, f"the first message of a call must be {' or '.join(map('`{}`'.format, allowed))}"
        )
    return request


async def read_open(requests: AsyncIterator[PromptPart[_Open]]) -> _Open:
    """Read the first message of a call, which must be `open`; raises as `read_first`."""
    return (await read_first(requests)).open


def check_id(field: str, value: str) -> str:
    """An id that a caller chose.

    Raises:
        InvalidRequest: it is too long, or holds what would break a line of a log.
    """
    if len(value) > MAX_ID_CHARS or not value.isprintable():
        raise InvalidRequest(field, value[:MAX_ID_CHARS], f"must be at most {MAX_ID_CHARS} printable characters")
    return value


def check_salt(value: bytes) -> bytes:
    """A cache salt that a caller chose.

    Raises:
        InvalidRequest: it is too long.
    """
    if len(value) > MAX_SALT_BYTES:
        raise InvalidRequest("cache_salt", f"of {len(value)} bytes", f"must have at most {MAX_SALT_BYTES} bytes")
    return value


async def read_pieces(requests: AsyncIterator[_Part], *, idle_s: float) -> AsyncIterator[_Part]:
    """Iterate over the messages between `open` and `end_of_prompt`; nothing is read after that.

    Raises:
        InvalidRequest: the half-close came first.
        DeadlineExceeded: the next message did not come within `idle_s`.
    """
    async for request in _pieces_and_end(requests, idle_s):
        if request.WhichOneof("part") != "end_of_prompt":
            yield request


async def read_token_ids(requests: AsyncIterator[PromptPart[object]], num_tokens: int) -> NDArray[np.int64]:
    """Read a prompt of exactly `num_tokens` token ids, and its `end_of_prompt`.

    Raises:
        InvalidRequest: it has more or fewer, holds another kind of message, or is cut off before `end_of_prompt`.
        DeadlineExceeded: a piece did not come within `UPLOAD_IDLE_S` of the one before.
        PeerUnavailable: other ids came than were sent.
    """
    token_ids = np.empty(num_tokens, dtype=np.int64)
    filled, checksum = 0, None
    async for request in _pieces_and_end(requests, UPLOAD_IDLE_S):
        match request.WhichOneof("part"):
            case "token_ids":
                piece = request.token_ids.ids
                if filled + len(piece) > num_tokens:
                    raise InvalidRequest("token_ids", filled + len(piece), f"{num_tokens} were announced")
                token_ids[filled : filled + len(piece)] = piece
                filled += len(piece)
            case "end_of_prompt":
                checksum = request.end_of_prompt.checksum if request.end_of_prompt.HasField("checksum") else None
            case part:
                raise InvalidRequest("part", part, "only `token_ids`, then `end_of_prompt`, may follow `open`")
    if filled != num_tokens:
        raise InvalidRequest("token_ids", filled, f"{num_tokens} were announced")
    if checksum not in (None, ids_checksum(token_ids)):
        raise PeerUnavailable("the prompt's token ids were damaged on the way (checksum)")
    return token_ids


async def read_changes(requests: AsyncIterator[RunningPart]) -> AsyncIterator[ScaleWish]:
    """Iterate over what the caller says while its request runs, until it closes its side.

    Raises:
        InvalidRequest: a kind of message that is not known here, or a value out of range.
    """
    async for request in requests:
        if (part := request.WhichOneof("part")) != "change_scale":
            raise InvalidRequest("part", part, "only `change_scale` may follow `end_of_prompt` or `resume`")
        yield scale_wish_from_pb(request.change_scale)


async def _pieces_and_end(requests: AsyncIterator[_Part], idle_s: float) -> AsyncIterator[_Part]:
    parts = aiter(requests)
    while True:
        try:
            async with asyncio.timeout(idle_s):
                request = await anext(parts, None)
        except TimeoutError as err:
            raise DeadlineExceeded(f"the next piece of the prompt did not come within {idle_s:g} s") from err
        if request is None:
            break
        yield request
        if request.WhichOneof("part") == "end_of_prompt":
            return
    # A caller that vanishes ends the iteration as well, before gRPC cancels the handler.
    raise InvalidRequest("end_of_prompt", None, "must come before the half-close; the prompt may have been cut off")
