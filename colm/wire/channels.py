"""Channels between nodes: one for each address, kept open from call to call."""

import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from colm.errors import InvalidRequest, PeerFailed, PeerRefused, PeerUnavailable, Unauthenticated
from colm.wire.endpoint import open_blocking_channel, open_channel
from colm.wire.security import Security, Tls

logger = logging.getLogger(__name__)

# What members always send as it shall be: whoever refuses it did not get what was sent.
_NEVER_WRONG = {"end_of_prompt", "message", "part"}
MAX_UNUSED = 32
"""Channels kept for addresses that nobody calls now. gRPC has closed their connections after `IDLE_MS` already."""

_Channel = TypeVar("_Channel", grpc.aio.Channel, grpc.Channel)


# A channel keeps the certificates that it was opened with: another address or other certificates, another channel.
_Key = tuple[str, Tls | None]


@dataclass(kw_only=True, slots=True, eq=False)
class _Shared(Generic[_Channel]):
    key: _Key
    channel: _Channel
    num_users: int = 0


class _Shelf(Generic[_Channel]):
    """Counts the users of each channel and keeps one channel an address for the next caller. Thread-safe.

    After certificates were renewed, callers get a new channel; calls on the old one end there.
    """

    def __init__(self, open_to: Callable[[str, Security], _Channel], security: Security) -> None:
        self._open_to = open_to
        self._security = security
        self._lock = threading.Lock()
        # Ordered by last use, the latest last.
        self._kept: dict[_Key, _Shared[_Channel]] = {}

    def take(self, address: str) -> _Shared[_Channel]:
        security = self._security.current()
        key = address, security.current_tls
        with self._lock:
            shared = self._kept.get(key) or _Shared(key=key, channel=self._open_to(address, security))
            self._kept[key] = shared
            shared.num_users += 1
            return shared

    def give_back(self, shared: _Shared[_Channel], *, is_lost: bool) -> list[_Channel]:
        """Return the channels that the caller must close: they have no users and get no new ones."""
        with self._lock:
            shared.num_users -= 1
            is_kept = self._kept.get(shared.key) is shared
            if is_kept:
                del self._kept[shared.key]
            if is_kept and not is_lost:
                self._kept[shared.key] = shared
            elif not shared.num_users:
                return [shared.channel]
            unused = [other for other in self._kept.values() if not other.num_users]
            surplus = unused[: max(0, len(unused) - MAX_UNUSED)]
            for other in surplus:
                del self._kept[other.key]
            return [other.channel for other in surplus]

    def clear(self) -> list[_Channel]:
        """Forget every kept channel and return them all, for the caller to close."""
        with self._lock:
            kept, self._kept = self._kept, {}
            return [shared.channel for shared in kept.values()]


def _between_members(address: str, cause: Unauthenticated | InvalidRequest) -> PeerUnavailable | None:
    """What a node's refusal is that is no fault of whoever asked this process; None for any other."""
    if isinstance(cause, Unauthenticated):
        logger.error("peer.refused address=%s cause=%s", address, cause)
        return PeerRefused(f"{address} does not admit this process of the cluster: {cause}")
    if cause.field in _NEVER_WRONG:
        return PeerUnavailable(f"{address} got something else than was sent: {cause}")
    return None


class Channels:
    """Channels of one event loop. A channel whose peer was lost is replaced: the new one connects without backoff.

    So is one on which a call failed in a way that says nothing: its connection may be damaged, and fail every call. A
    call that is not admitted ends with `PeerRefused`.

    Streams of one connection do not wait for each other: gRPC limits the unread bytes of each stream separately.
    """

    def __init__(self, security: Security) -> None:
        self._shelf = _Shelf[grpc.aio.Channel](open_channel, security)

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to an address, for calls that end with the block; the block lets all other errors through."""
        shared, is_lost = self._shelf.take(address), False
        try:
            yield shared.channel
        except (PeerUnavailable, PeerFailed):
            is_lost = True
            raise
        except (Unauthenticated, InvalidRequest) as err:
            if (found := _between_members(address, err)) is None:
                raise
            is_lost = True
            raise found from err
        finally:
            for channel in self._shelf.give_back(shared, is_lost=is_lost):
                await channel.close()

    async def close(self) -> None:
        """Close them all; every call must have ended."""
        for channel in self._shelf.clear():
            await channel.close()


class BlockingChannels:
    """`Channels` for threads."""

    def __init__(self, security: Security) -> None:
        self._shelf = _Shelf[grpc.Channel](open_blocking_channel, security)

    @contextmanager
    def use(self, address: str) -> Iterator[grpc.Channel]:
        """See `Channels.use`."""
        shared, is_lost = self._shelf.take(address), False
        try:
            yield shared.channel
        except (PeerUnavailable, PeerFailed):
            is_lost = True
            raise
        except (Unauthenticated, InvalidRequest) as err:
            if (found := _between_members(address, err)) is None:
                raise
            is_lost = True
            raise found from err
        finally:
            for channel in self._shelf.give_back(shared, is_lost=is_lost):
                channel.close()

    def close(self) -> None:
        """Close them all; every call must have ended."""
        for channel in self._shelf.clear():
            channel.close()
