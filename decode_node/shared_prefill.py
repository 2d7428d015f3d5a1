"""Fetches each prompt's keys and values once, for all requests that want them.

A prefill begins for the request that came first, and goes on as long as any request wants what it brings. Those that
share its pages follow its events, and fail as it fails.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from colm.errors import InvalidRequest, PeerUnavailable
from colm.events import PrefillProgress, Queued
from decode_node.kv_fetch import Emit, KvAccount, KvFetcher, KvOrder
from decode_node.kv_store import KvStore
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease
from decode_node.prefix_cache import Reservation

Follow = Callable[[Emit], Awaitable[None]]
"""Emits what happens until all is there, or raises why it will not be."""


class _Reader:
    """Events that one request has not seen yet: of equal kinds in a row the newest."""

    def __init__(self) -> None:
        self.news: deque[PrefillProgress | Queued] = deque()
        self.woken = asyncio.Event()

    def put(self, event: PrefillProgress | Queued) -> None:
        if self.news and type(self.news[-1]) is type(event):
            self.news.pop()
        self.news.append(event)
        self.woken.set()


class _Prefill:
    """One fetch, as long as it has users.

    Args:
        fetch: runs as a task.
        give_up: called when its last user leaves before its end: nobody may find it any more.
        end: called before anybody hears that it is over, with whether all is there.
    """

    def __init__(
        self, fetch: Callable[[Emit], Awaitable[None]], give_up: Callable[[], None], end: Callable[[bool], None]
    ) -> None:
        self.copies: set[tuple[int, int]] = set()
        """Pages to copy once all is there, for requests that still want them."""
        self.is_exact = False
        """All is there, and came in the tiles by which it is named."""
        self._give_up = give_up
        self._end = end
        self._num_users = 0
        self._readers: list[_Reader] = []
        """In the order of asking, in which they are told, and go on to the batch."""
        self._is_over = False
        self._task = asyncio.ensure_future(fetch(self._emit))
        # Not in the task itself: one that is cancelled before its first step runs nothing of its own.
        self._task.add_done_callback(self._ended)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep it going; when the last user leaves before its end, it is given up."""
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            if not self._num_users and not self._task.done():
                self._give_up()
                self._task.cancel()

    async def follow(self, emit: Emit) -> None:
        """See `Follow`; for users."""
        reader = _Reader()
        self._readers.append(reader)
        try:
            while not self._is_over or reader.news:
                reader.woken.clear()
                if reader.news:
                    await emit(reader.news.popleft())
                else:
                    await reader.woken.wait()
            self._task.result()
        finally:
            self._readers.remove(reader)

    async def _emit(self, event: PrefillProgress | Queued) -> None:
        for reader in self._readers:
            reader.put(event)

    def _ended(self, task: "asyncio.Future[None]") -> None:
        self._end(not task.cancelled() and task.exception() is None)
        self._is_over = True
        for reader in self._readers:
            reader.woken.set()


class SharedPrefills:
    """Runs the prefills of a node. Lives on one event loop.

    Args:
        fetcher: brings keys and values.
        page_line: lent the pages.
        store: has them.
    """

    def __init__(self, fetcher: KvFetcher, page_line: PageLine, store: KvStore) -> None:
        self._fetcher = fetcher
        self._page_line = page_line
        self._store = store
        self._running: dict[PageLease, _Prefill] = {}

    @contextmanager
    def of(self, reservation: Reservation, order: KvOrder | None, account: KvAccount) -> Iterator[Follow]:
        """Bring what a reservation's pages do not hold, as long as the block lasts; call it as soon as it is made.

        Args:
            reservation: the pages.
            order: what nobody brings; None where all was found.
            account: of what the order takes.
        """
        with ExitStack() as stack:
            sources = [self._running[lease] for lease in reservation.sources]
            prefills = sources if order is None else [self._begin(reservation.lease, sources, order, account)]
            for prefill in prefills:
                stack.enter_context(prefill.used())
            if (copy := reservation.copy) is not None:
                if reservation.copied_by is None:
                    self._store.copy_page(*copy)
                else:
                    copies = self._running[reservation.copied_by].copies
                    copies.add(copy)
                    stack.callback(copies.discard, copy)

            async def follow(emit: Emit) -> None:
                for prefill in prefills:
                    await prefill.follow(emit)

            yield follow

    def _begin(self, lease: PageLease, sources: Sequence[_Prefill], order: KvOrder, account: KvAccount) -> _Prefill:
        page_line, using = self._page_line, ExitStack()
        for source in sources:
            using.enter_context(source.used())
        page_line.retain(lease)

        async def fetch(emit: Emit) -> None:
            for source in sources:  # a prefill node has by then computed what this prompt begins with
                await source.follow(emit)
            is_exact = all(source.is_exact for source in sources)
            try:
                await self._fetcher.fetch(replace(order, is_prefix_exact=is_exact), account, emit)
            except InvalidRequest as err:
                if not order.first_token:
                    raise
                self._fetcher.tile_tokens = 0
                raise PeerUnavailable(f"a prefill node computes other tiles than the one before: {err}") from err

        def give_up() -> None:
            page_line.cache.abandon(lease)

        def end(has_come: bool) -> None:
            if has_come:
                for copy in prefill.copies:
                    self._store.copy_page(*copy)
            # Cut into other tiles than was thought, its tokens stand under wrong names.
            prefill.is_exact = has_come and account.tile_tokens == {order.tile_tokens}
            if prefill.is_exact:
                page_line.cache.arrived(lease)
            else:
                page_line.cache.abandon(lease)
            del self._running[lease]
            using.close()
            page_line.release(lease)

        prefill = self._running[lease] = _Prefill(fetch, give_up, end)
        return prefill
