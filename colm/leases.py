"""Who may open a stream on this node: promises given through the cluster, redeemed over gRPC."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from colm.errors import LeaseExpired

logger = logging.getLogger(__name__)


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
        """Redeem a lease: its stream has come.

        Raises:
            LeaseExpired: never granted, already used, or expired.
        """
        lease = self._leases.get(lease_id)
        if lease is None or lease.opened.is_set():
            raise LeaseExpired(
                f"lease {lease_id!r} was not granted by this node, was used before, or is older than {self._ttl_s:g} s"
            )
        lease.opened.set()
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease; doing so twice is harmless."""
        lease.closed.set()
        self._leases.pop(lease.lease_id, None)

    async def offer(self, address: str, *, again: bool) -> AsyncIterator[tuple[str, str]]:
        """Grant a lease, yield (address, lease id), and stay until it has ended.

        This is the body of a replica's `lease` call: while it is open, Ray Serve counts the work.

        Args:
            address: of this node.
            again: grant the next lease as soon as the stream of the last has ended, until its holder ends the call.
        """
        while True:
            lease = self.grant()
            try:
                yield address, lease.lease_id
                await asyncio.wait_for(lease.opened.wait(), self._ttl_s)
                await lease.closed.wait()
            except TimeoutError:
                logger.info("lease.expired lease=%s ttl_s=%g", lease.lease_id, self._ttl_s)
                return
            finally:
                self.release(lease)
            if not again:
                return
