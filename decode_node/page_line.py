"""Lends pages: first come, first served, to each request as soon as pages for its whole answer are free."""

from colm.line import Beat, Line
from decode_node.page_pool import PageLease, PagePool


class PageLine:
    """Reserves and releases the pages of a pool. Lives on one event loop.

    Args:
        pool: the pages; nobody else takes from it.
        max_waiting: requests that may wait; the next is refused.
    """

    def __init__(self, pool: PagePool, *, max_waiting: int) -> None:
        self.pool = pool
        self._line = Line("KV pages", max_waiting=max_waiting)

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    def reserve_now(self, owner: str, num_pages: int) -> PageLease | None:
        """Take pages without waiting; None where others wait already or too few are free."""
        return None if len(self._line) else self.pool.reserve(owner, num_pages)

    async def reserve(self, owner: str, num_pages: int, beat: Beat) -> PageLease:
        """Take pages, in order of asking; `num_pages` must be at most the pool's.

        Raises:
            CapacityExceeded: too many wait already.
        """
        return await self._line.turn(lambda: self.pool.reserve(owner, num_pages), beat)

    def retain(self, lease: PageLease) -> None:
        """Add a holder, who may write into the pages."""
        self.pool.retain(lease)

    def release(self, lease: PageLease) -> None:
        """Remove a holder; when the last one goes, the pages are free for the next in line."""
        if self.pool.release(lease):
            self._line.look_again()
