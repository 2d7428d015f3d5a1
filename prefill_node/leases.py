"""Who may open a stream here, and since when: the other half of a decode node's reservation."""

import asyncio
import secrets
from dataclasses import dataclass, field

from colm.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise to serve one stream."""

    lease_id: str
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseTable:
    """Leases that are granted and not yet released. Lives on one event loop.

    A lease ends when its stream ends, when its holder releases it, or when no stream came within `ttl_s`.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self) -> Lease:
        """Make a new lease."""
        lease = Lease(secrets.token_hex(8))
        self._leases[lease.lease_id] = lease
        return lease

    def open(self, lease_id: str) -> Lease:
        """The lease's stream has come.

        Raises:
            InvalidRequest: never granted, already used, or expired.
        """
        lease = self._leases.get(lease_id)
        if lease is None or lease.opened.is_set():
            raise InvalidRequest("lease_id", lease_id, "must be a lease granted by this node and not used before")
        lease.opened.set()
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease; doing so twice is harmless."""
        lease.closed.set()
        self._leases.pop(lease.lease_id, None)

    async def held(self, lease: Lease) -> None:
        """Wait until the lease's stream has ended, or has failed to come in time."""
        try:
            await asyncio.wait_for(lease.opened.wait(), self._ttl_s)
            await lease.closed.wait()
        except TimeoutError:
            pass
        finally:
            self.release(lease)
