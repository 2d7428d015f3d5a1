"""Where a decode node gets a prefill node from."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillLease:
    """One prefill node, ours for one stream."""

    address: str
    lease_id: str


class PrefillPool(Protocol):
    """Lends prefill nodes. The cluster's pool asks Ray Serve; the static one knows addresses."""

    def lease(self, *, num_tokens: int) -> AbstractAsyncContextManager[PrefillLease]:
        """Borrow a node for a prompt of that length; leaving the context gives it back.

        Raises:
            PeerUnavailable: none can be had just now; worth trying again.
            CapacityExceeded: too many wait already.
        """


class StaticPrefillPool:
    """Prefill nodes at fixed addresses; the one with the fewest of our streams is next."""

    def __init__(self, addresses: Sequence[str]) -> None:
        if not addresses:
            raise ValueError("a decode node needs the address of at least one prefill node")
        self._streams = dict.fromkeys(addresses, 0)

    @asynccontextmanager
    async def lease(self, *, num_tokens: int) -> AsyncIterator[PrefillLease]:  # noqa: ARG002 - the pool's contract
        """Borrow the least used node; a node that just failed goes to the end of the line."""
        address = min(self._streams, key=self._streams.__getitem__)
        self._streams[address] += 1
        try:
            yield PrefillLease(address=address, lease_id="")
        finally:
            self._streams[address] -= 1
            self._streams[address] = self._streams.pop(address)
