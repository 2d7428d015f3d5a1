"""Checksums of whole messages, on connections without TLS, which has its own.

A sealed message ends with its field `checksum`, XXH3-64 of the bytes before it. Its seed is the number of messages that
went before it that way in its call, so that one which was lost is missed. A caller that seals says so in its call's
metadata: then every request must be sealed, and every response is.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

import xxhash
from google.protobuf.message import Message

from colm.errors import ColmError, ConnectionLost

CHECKSUM_FIELD = 15
"""Its number in every message that may be sealed, but for the KV stream's responses, which end with their payload."""
SEALS = ("colm-checksums", "xxh3")
"""The metadata of a call that is sealed both ways."""
_DIGEST_BYTES = 8

_M = TypeVar("_M", bound=Message)


class Unreadable:
    """Stands for a message that could not be read; gRPC's deserializers must not fail.

    Args:
        error: why; raised by whoever wants the message.
    """

    def __init__(self, error: ColmError) -> None:
        self.error = error


def readable(message: _M | Unreadable) -> _M:
    """The message.

    Raises:
        ColmError: it could not be read.
    """
    if isinstance(message, Unreadable):
        raise message.error
    return message


def seal(data: bytes, number: int = 0, field: int = CHECKSUM_FIELD) -> bytes:
    """A message's bytes with their checksum behind them.

    Args:
        data: the message.
        number: of messages before it, that way in its call.
        field: number of the fixed64 field.
    """
    return data + bytes([field << 3 | 1]) + xxhash.xxh3_64_digest(data, seed=number)[::-1]


def is_sealed(data: bytes, number: int = 0, field: int = CHECKSUM_FIELD) -> bool:
    """Whether a message ends with the right checksum."""
    return data == seal(data[: -_DIGEST_BYTES - 1], number, field)


def sealing(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """A serializer that seals the messages of one call."""
    number = count()
    return lambda message: seal(serialize(message), next(number))


def opening(
    parse: Callable[[bytes], Any], is_demanded: Callable[[], bool], seen: Callable[[], None] = lambda: None
) -> Callable[[bytes], Any]:
    """A deserializer of one call's messages that makes `Unreadable` of what was damaged on the way.

    Args:
        parse: of the message.
        is_demanded: whether a message without a checksum is damaged, too.
        seen: called for each message with the right one.
    """
    number = count()

    def read(data: bytes) -> Any:
        if is_sealed(data, next(number)):
            seen()
            return parse(data[: -_DIGEST_BYTES - 1])
        if is_demanded() or _claims_checksum(message := parse(data)):
            return Unreadable(ConnectionLost("a message was damaged or lost on the way (checksum)"))
        return message

    return read


def _claims_checksum(message: Message) -> bool:
    return "checksum" in message.DESCRIPTOR.fields_by_name and bool(message.HasField("checksum"))


class SealedChannel:
    """A channel whose calls are sealed. The server's responses must be once one has been.

    Args:
        channel: gRPC's, of either kind.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._has_sealed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def __enter__(self) -> "SealedChannel":
        self._channel.__enter__()
        return self

    def __exit__(self, *raised: Any) -> Any:
        return self._channel.__exit__(*raised)

    async def __aenter__(self) -> "SealedChannel":
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> Any:
        return await self._channel.__aexit__(*raised)

    def unary_unary(self, *of_call: Any, **options: Any) -> Callable[..., Any]:
        """As gRPC's."""
        return self._sealed(self._channel.unary_unary, *of_call, **options)

    def unary_stream(self, *of_call: Any, **options: Any) -> Callable[..., Any]:
        """As gRPC's."""
        return self._sealed(self._channel.unary_stream, *of_call, **options)

    def stream_unary(self, *of_call: Any, **options: Any) -> Callable[..., Any]:
        """As gRPC's."""
        return self._sealed(self._channel.stream_unary, *of_call, **options)

    def stream_stream(self, *of_call: Any, **options: Any) -> Callable[..., Any]:
        """As gRPC's."""
        return self._sealed(self._channel.stream_stream, *of_call, **options)

    def _sealed(
        self,
        make: Callable[..., Callable[..., Any]],
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        **options: Any,
    ) -> Callable[..., Any]:
        def begin(*requests: Any, metadata: Any = None, **of_call: Any) -> Any:
            read = response_deserializer and opening(response_deserializer, lambda: self._has_sealed, self._note)
            call = make(method, sealing(request_serializer or bytes), read, **options)
            return call(*requests, metadata=(*(metadata or ()), SEALS), **of_call)

        return begin

    def _note(self) -> None:
        self._has_sealed = True
