"""Counts pages: which are free, which are only kept, and how many holders the others have. No tensors here."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Runs = tuple[tuple[int, int], ...]
"""(first page, count) of neighbours, in the order of the tokens that they hold."""


@dataclass(frozen=True, slots=True, eq=False)
class PageBlock:
    """Pages that become free together: once no lease has them, and nobody keeps them."""

    runs: Runs

    @property
    def num_pages(self) -> int:
        """Pages of all runs."""
        return sum(count for _, count in self.runs)


@dataclass(frozen=True, slots=True, eq=False)
class PageLease:
    """A request's pages, until the last of their holders lets go."""

    owner: str
    blocks: tuple[PageBlock, ...]
    """In the order of the tokens that they hold; other leases may have the same."""

    @property
    def runs(self) -> Runs:
        """Those of all blocks, joined where they are neighbours."""
        return _joined(run for block in self.blocks for run in block.runs)

    @property
    def num_pages(self) -> int:
        """Pages of all blocks."""
        return sum(block.num_pages for block in self.blocks)


class PagePool:
    """A fixed number of pages, reserved and released as a whole.

    Whoever may write into pages holds them: the request, the thread that receives its keys and values, the loop that
    decodes it. When the last has let go, its blocks lose a lease, so no order of events frees pages under a writer.

    A block is in use while a lease has it, idle while it is only kept for whoever may want what it holds, else free.

    Free pages are kept as sorted runs, and a reservation takes whole runs where it can: neighbouring pages lie
    side by side in memory, and reading them is a plain stream.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.num_pages = num_pages
        self.num_free = num_pages
        """Pages that nobody has or keeps."""
        self.num_idle = 0
        """Pages that are only kept."""
        self._free: list[tuple[int, int]] = [(0, num_pages)]  # (first page, count), sorted, never touching
        self._num_holders: dict[PageLease, int] = {}
        self._num_leases: dict[PageBlock, int] = {}  # of every block that is not free
        self._kept: set[PageBlock] = set()

    @property
    def num_used(self) -> int:
        """Pages that requests have."""
        return self.num_pages - self.num_free - self.num_idle

    def reserve(
        self, owner: str, num_pages: int, *, shared: Sequence[PageBlock] = (), sizes: Sequence[int] = ()
    ) -> PageLease | None:
        """Take free pages, all or none, for one holder; None where fewer are free.

        Args:
            owner: for messages.
            num_pages: to take.
            shared: blocks in use or idle that the lease has too, before its own.
            sizes: pages of its first own blocks; the rest is one more.
        """
        if num_pages > self.num_free:
            return None
        own = _cut(self._take(num_pages), [*sizes, num_pages - sum(sizes)])
        self._num_leases |= dict.fromkeys(own, 0)
        for block in shared:
            if self.is_idle(block):
                self.num_idle -= block.num_pages
        lease = PageLease(owner, (*shared, *own))
        for block in lease.blocks:
            self._num_leases[block] += 1
        self._num_holders[lease] = 1
        return lease

    def is_idle(self, block: PageBlock) -> bool:
        """Whether a block that is not free is only kept."""
        return not self._num_leases[block]

    def keep(self, block: PageBlock) -> None:
        """Keep a block in use from becoming free."""
        assert not self.is_idle(block), "a block that is kept already"
        self._kept.add(block)

    def drop(self, block: PageBlock) -> None:
        """Keep a block no longer; if it was idle, it is free."""
        self._kept.remove(block)
        if self.is_idle(block):
            self.num_idle -= block.num_pages
            self._set_free(block)

    def retain(self, lease: PageLease) -> None:
        """Add a holder.

        Raises:
            KeyError: nobody holds them.
        """
        self._num_holders[lease] += 1

    def release(self, lease: PageLease) -> bool:
        """Remove a holder.

        Returns:
            Whether it was the last one, so that what no other lease has and nobody keeps is free.

        Raises:
            KeyError: nobody holds them.
        """
        self._num_holders[lease] -= 1
        if self._num_holders[lease]:
            return False
        del self._num_holders[lease]
        for block in lease.blocks:
            self._num_leases[block] -= 1
            if self.is_idle(block):
                if block in self._kept:
                    self.num_idle += block.num_pages
                else:
                    self._set_free(block)
        return True

    def check_integrity(self) -> None:
        """Every page is free or in exactly one block that a lease has or somebody keeps; true after every call."""
        assert self._free == sorted(self._free), "free runs out of order"
        assert all(a + n < b for (a, n), (b, _) in zip(self._free, self._free[1:], strict=False)), "free runs touch"
        assert all(count > 0 for count in self._num_holders.values()), "a lease without a holder"
        num_leases = Counter(block for lease in self._num_holders for block in lease.blocks)
        assert num_leases == Counter(self._num_leases), "a block's leases are counted wrongly"
        assert self._num_leases.keys() == {*num_leases, *self._kept}, "a block that nobody has or keeps"
        assert self.num_idle == sum(block.num_pages for block in self._kept if not num_leases[block])
        assert self.num_free == sum(count for _, count in self._free)
        next_page = 0
        for start, count in sorted([*self._free, *(run for block in self._num_leases for run in block.runs)]):
            assert start == next_page, "a page is lost or held twice"
            assert count > 0, "a run of no pages"
            next_page = start + count
        assert next_page == self.num_pages, "a page is lost"

    def _set_free(self, block: PageBlock) -> None:
        del self._num_leases[block]
        for start, count in block.runs:
            self._put(start, count)

    def _take(self, num_pages: int) -> list[tuple[int, int]]:
        self.num_free -= num_pages
        taken: list[tuple[int, int]] = []
        wanted = num_pages
        while wanted:
            # The first run that holds the rest; where none does, the longest, so that pieces stay few.
            index = next((i for i, (_, count) in enumerate(self._free) if count >= wanted), None)
            if index is None:
                index = max(range(len(self._free)), key=lambda i: self._free[i][1])
            start, count = self._free[index]
            used = min(count, wanted)
            taken.append((start, used))
            wanted -= used
            if used == count:
                del self._free[index]
            else:
                self._free[index] = (start + used, count - used)
        return taken

    def _put(self, start: int, count: int) -> None:
        self.num_free += count
        index = bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + count:
            count += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == start:
            previous_start, previous_count = self._free[index - 1]
            self._free[index - 1] = (previous_start, previous_count + count)
        else:
            self._free.insert(index, (start, count))


def _joined(runs: Iterable[tuple[int, int]]) -> Runs:
    joined: list[tuple[int, int]] = []
    for start, count in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((start, count))
    return tuple(joined)


def _cut(runs: Iterable[tuple[int, int]], sizes: Iterable[int]) -> list[PageBlock]:
    """Divide runs into blocks of so many pages; together they have as many."""
    left = [*runs][::-1]
    blocks = []
    for size in sizes:
        block: list[tuple[int, int]] = []
        while size:
            start, count = left.pop()
            used = min(count, size)
            block.append((start, used))
            size -= used
            if used < count:
                left.append((start + used, count - used))
        blocks.append(PageBlock(tuple(block)))
    return blocks
