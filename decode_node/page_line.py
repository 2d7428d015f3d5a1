"""Lends pages: clients take turns, each request gets them as soon as those for its whole answer are free or idle."""

import asyncio
from collections.abc import Hashable

from colm.line import Beat, Line
from decode_node.page_pool import PageLease, PagePool
from decode_node.prefix_cache import PagesWanted, PrefixCache, Reservation


class PageLine:
    """Reserves and releases the pages of a pool. Lives on one event loop.

    Args:
        pool: the pages; nobody else takes from it.
        max_waiting: requests that may wait; the next is refused.
        max_idle_pages: pages of prompts that may be kept for others beside those in use.
    """

    def __init__(self, pool: PagePool, *, max_waiting: int, max_idle_pages: int = 0) -> None:
        self.pool = pool
        self.cache = PrefixCache(pool, max_idle_pages=max_idle_pages)
        self._line = Line("KV pages", max_waiting=max_waiting)
        self._wanted: dict[asyncio.Event, tuple[str, PagesWanted]] = {}
        """Of each place in line, by whom."""

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def waiting(self) -> list[tuple[str, PagesWanted]]:
        """Who waits, and what they want, in the order of their turns."""
        return [self._wanted[place] for place in self._line.places]

    def reserve_now(self, owner: str, wanted: PagesWanted) -> Reservation | None:
        """Take pages without waiting; None where others wait already or too few can be had."""
        return None if len(self._line) else self.cache.reserve(owner, wanted)

    async def reserve(self, owner: str, wanted: PagesWanted, beat: Beat, client: Hashable = None) -> Reservation:
        """Take pages, one request of each client in a round; those wanted must be at most the pool's.

        Nothing else is reserved between the success and the caller's next step.

        Raises:
            CapacityExceeded: too many wait already.
        """
        place = asyncio.Event()
        self._wanted[place] = owner, wanted
        try:
            return await self._line.turn(lambda: self.cache.reserve(owner, wanted), beat, client, place=place)
        finally:
            del self._wanted[place]

    def retain(self, lease: PageLease) -> None:
        """Add a holder, who may write into the pages."""
        self.pool.retain(lease)

    def release(self, lease: PageLease) -> None:
        """Remove a holder; when the last one goes, what nobody else uses can be had by the next in line."""
        if self.cache.release(lease):
            self._line.look_again()
