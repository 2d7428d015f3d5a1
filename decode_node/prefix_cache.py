"""Keeps the pages of prompts for requests whose prompts begin alike. No tensors, no tokens, no asyncio.

A prompt is divided into blocks, each with a key that stands for its tokens and all before them. A block of the cache is

    coming -> here          a request brings its tokens; others that want them may have its pages at once, and wait
    coming -> dropped       that failed
    here   -> dropped       its pages are wanted for something else, or there are too many

The pages of a block that is here are never written again. Where a prompt ends inside a page, its request goes on
writing behind it: that page, the stub, is copied and not shared.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from colm.segmented_lru import SegmentedLru
from decode_node.page_pool import PageBlock, PageLease, PagePool


@dataclass(frozen=True, kw_only=True, slots=True)
class PagesWanted:
    """What a request needs."""

    num_pages: int
    """In all; those of the prompt's blocks are the first."""
    keys: tuple[bytes, ...] = ()
    """Of the prompt's blocks; none of a request that shares nothing."""
    sizes: tuple[int, ...] = ()
    """Whole pages of each block."""
    has_stub: bool = False
    """The last block goes on into one more page, and ends inside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """What a request has got."""

    lease: PageLease
    num_found: int = 0
    """Leading blocks that are here, or coming."""
    sources: tuple[PageLease, ...] = ()
    """Leases of the requests that bring those that are coming, in the order of the blocks."""
    copy: tuple[int, int] | None = None
    """(stub, own page): the one to copy to the other, for what the prompt has in both."""
    copied_by: PageLease | None = None
    """The source that brings the stub; None where it is here, and must be copied before anything else is reserved."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    key: bytes
    pages: PageBlock
    stub: PageBlock | None

    @property
    def blocks(self) -> tuple[PageBlock, ...]:
        return (self.pages,) if self.stub is None else (self.pages, self.stub)

    @property
    def num_pages(self) -> int:
        return sum(block.num_pages for block in self.blocks)


class PrefixCache:
    """Reserves pages of a pool, and keeps those of prompts as long as nobody needs them otherwise.

    Idle pages give way to every reservation, so nothing waits for pages that would not wait without this cache.
    Segmented LRU: blocks that were never wanted again go first. A block is newer than those that follow it, so a prompt
    loses its end before its beginning.

    Args:
        pool: the pages; nobody else takes from it.
        max_idle_pages: pages that may be kept beside those in use.
    """

    def __init__(self, pool: PagePool, *, max_idle_pages: int) -> None:
        self.pool = pool
        self.num_evicted_pages = 0
        self._max_idle_pages = max_idle_pages
        self._entries: dict[bytes, _Entry] = {}
        self._lru: SegmentedLru[_Entry] = SegmentedLru(max_idle_pages)
        self._coming: dict[PageLease, list[_Entry]] = {}
        self._source: dict[_Entry, PageLease] = {}

    @property
    def num_available(self) -> int:
        """Pages that a request can have now."""
        return self.pool.num_free + self.pool.num_idle

    def num_needed(self, wanted: PagesWanted) -> int:
        """Pages of the available ones that a request would take now, those among them that it would find."""
        return self._num_needed(wanted, list(self._found(wanted.keys)))

    def reserve(self, owner: str, wanted: PagesWanted) -> Reservation | None:
        """Take a request's pages, all or none; None where too many are in use.

        The caller brings the tokens of the blocks that were not found, and then says `arrived` or `abandon`.
        """
        found = list(self._found(wanted.keys))
        reservation = self._reserve(owner, wanted, found)
        if reservation is None and len(found) == len(wanted.keys) and wanted.has_stub:
            # There may be no page to copy the stub to, as long as the stub is there.
            reservation = self._reserve(owner, wanted, found[:-1])
        return reservation

    def release(self, lease: PageLease) -> bool:
        """Remove a holder; returns whether it was the last."""
        if not self.pool.release(lease):
            return False
        self._evict(self.pool.num_idle - self._max_idle_pages, ())
        return True

    def arrived(self, lease: PageLease) -> None:
        """Note that the tokens of all blocks that a lease's request brings are here."""
        for entry in self._coming.pop(lease, ()):
            del self._source[entry]

    def abandon(self, lease: PageLease) -> None:
        """Note that they will not come: nobody finds these blocks any more."""
        for entry in self._coming.pop(lease, ()):
            self._forget(entry)

    def check_integrity(self) -> None:
        """True after every call."""
        self.pool.check_integrity()
        self._lru.check_integrity()
        assert {*self._lru} == {*self._entries.values()}
        assert all(self._entries[entry.key] is entry for entry in self._source), "a block is coming that nobody finds"
        assert {*self._source} == {entry for coming in self._coming.values() for entry in coming}
        for lease, coming in self._coming.items():
            assert {*lease.blocks}.issuperset(block for entry in coming for block in entry.blocks)
        assert self.pool.num_idle <= self._max_idle_pages, "too many pages are idle"

    def _found(self, keys: Iterable[bytes]) -> Iterator[_Entry]:
        for key in keys:
            if (entry := self._entries.get(key)) is None:
                return
            yield entry

    def _num_needed(self, wanted: PagesWanted, found: Sequence[_Entry]) -> int:
        # What was found idle is not there to be taken otherwise.
        return wanted.num_pages - sum(wanted.sizes[: len(found)]) + sum(map(self._num_idle, found))

    def _reserve(self, owner: str, wanted: PagesWanted, found: Sequence[_Entry]) -> Reservation | None:
        if self._num_needed(wanted, found) > self.num_available:
            return None
        own_pages = wanted.num_pages - sum(wanted.sizes[: len(found)])
        self._evict(own_pages - self.pool.num_free, found)
        sizes = wanted.sizes[len(found) :]
        has_own_stub = wanted.has_stub and bool(sizes)
        lease = self.pool.reserve(
            owner,
            own_pages,
            shared=[entry.pages for entry in found],
            sizes=(*sizes, 1) if has_own_stub else sizes,
        )
        assert lease is not None, "pages that were counted are not there"
        own = lease.blocks[len(found) :]
        copy = copied_by = None
        if wanted.has_stub and not sizes and found:
            stub = found[-1].stub
            assert stub is not None, "a block without the page on which it ends"
            copy, copied_by = (stub.runs[0][0], own[0].runs[0][0]), self._source.get(found[-1])
        sources = dict.fromkeys(self._source[entry] for entry in found if entry in self._source)
        for entry in reversed(found):
            self._lru.use(entry)
        if keys := wanted.keys[len(found) :]:
            self._expect(lease, keys, own, own[len(keys)] if has_own_stub else None)
        return Reservation(lease=lease, num_found=len(found), sources=tuple(sources), copy=copy, copied_by=copied_by)

    def _expect(
        self, lease: PageLease, keys: Sequence[bytes], own: Sequence[PageBlock], stub: PageBlock | None
    ) -> None:
        coming = []
        for key, pages in zip(keys, own, strict=False):
            if (orphan := self._entries.get(key)) is not None:  # behind a block that was dropped
                self._forget(orphan)
            ends_here = stub is not None and key is keys[-1]
            entry = _Entry(key, pages, stub if ends_here else None)
            for block in entry.blocks:
                self.pool.keep(block)
            self._entries[key] = entry
            self._source[entry] = lease
            coming.append(entry)
        for entry in reversed(coming):
            self._lru.add(entry, entry.num_pages)
        self._coming[lease] = coming

    def _evict(self, num_pages: int, spared: Iterable[_Entry]) -> None:
        """Make at least so many idle pages free, if there are, and none of the spared ones."""
        if num_pages <= 0:
            return
        spared, victims = {*spared}, []
        for entry in self._lru:
            if num_pages <= 0:
                break
            if entry not in spared and (num_idle := self._num_idle(entry)):
                victims.append(entry)
                num_pages -= num_idle
                self.num_evicted_pages += num_idle
        for entry in victims:
            self._forget(entry)

    def _num_idle(self, entry: _Entry) -> int:
        return sum(block.num_pages for block in entry.blocks if self.pool.is_idle(block))

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        if (lease := self._source.pop(entry, None)) is not None and lease in self._coming:
            self._coming[lease].remove(entry)
        self._lru.remove(entry)
        for block in entry.blocks:
            self.pool.drop(block)
