"""Decode nodes for the gateway's requests, lent by Ray Serve."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from cluster.front_door.placement import DecodeLease
from cluster.replicas.lender import ServeLender
from colm.line import Beat
from colm.nodes import Role


class ServeDecodePool:
    """Lends the decode nodes that Ray Serve runs."""

    def __init__(self, handle: Any, *, max_waiting: int) -> None:
        # There is one gateway.
        self._lender = ServeLender(handle, Role.DECODE, max_waiting=max_waiting, is_alone=True)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a node."""
        return self._lender.num_waiting

    def close(self) -> None:
        """Give back the nodes that nobody uses."""
        self._lender.close()

    @asynccontextmanager
    async def lease(self, *, beat: Beat, refused_by: Collection[str] = ()) -> AsyncIterator[DecodeLease]:
        """Borrow a node from Serve."""
        async with self._lender.lease(beat, refused_by=refused_by) as (address, lease_id):
            yield DecodeLease(address=address, lease_id=lease_id)
