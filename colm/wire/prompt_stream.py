"""A prompt as it arrives between nodes: one `open`, then token ids in pieces, then the half-close."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from colm.errors import DeadlineExceeded, InvalidRequest
from colm.wire.v1 import common_pb2 as pb

OPEN_TIMEOUT_S = 10.0
"""How long a call may stay silent before its `open`; it holds a place of the server's meanwhile."""

_Open = TypeVar("_Open", covariant=True)


class PromptPart(Protocol[_Open]):
    """What `DecodeRequest` and `PullKvRequest` have in common."""

    @property
    def open(self) -> _Open:
        """Set in the first message."""

    @property
    def token_ids(self) -> pb.TokenIds:
        """Set in all later ones."""

    def WhichOneof(self, oneof_group: str, /) -> str | None:
        """Which of the two is set."""


async def read_open(requests: AsyncIterator[PromptPart[_Open]]) -> _Open:
    """The first message of a call.

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
    if (part := request.WhichOneof("part")) != "open":
        raise InvalidRequest("part", part, "the first message of a call must be `open`")
    return request.open


async def read_token_ids(requests: AsyncIterator[PromptPart[object]], num_tokens: int) -> NDArray[np.int64]:
    """The rest of a call: exactly the announced number of ids.

    Raises:
        InvalidRequest: more, fewer, or something else.
    """
    token_ids = np.empty(num_tokens, dtype=np.int64)
    filled = 0
    async for request in requests:
        if (part := request.WhichOneof("part")) != "token_ids":
            raise InvalidRequest("part", part, "only `token_ids` may follow `open`")
        piece = request.token_ids.ids
        if filled + len(piece) > num_tokens:
            raise InvalidRequest("token_ids", filled + len(piece), f"{num_tokens} were announced")
        token_ids[filled : filled + len(piece)] = piece
        filled += len(piece)
    if filled != num_tokens:
        raise InvalidRequest("token_ids", filled, f"{num_tokens} were announced")
    return token_ids
