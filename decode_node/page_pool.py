"""Counts pages: which are free, and how many holders the others have. No tensors here."""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class PageLease:
    """Pages that belong together until the last of their holders lets go."""

    owner: str
    runs: tuple[tuple[int, int], ...]
    """(first page, count) of neighbours, in the order of the tokens that they hold."""

    @property
    def num_pages(self) -> int:
        """Pages of all runs."""
        return sum(count for _, count in self.runs)


class PagePool:
    """A fixed number of pages, reserved and released as a whole.

    Whoever may write into pages holds them: the request, the thread that receives its keys and values, the loop that
    decodes it. They are free again when the last has let go, so no order of events frees pages under a writer.

    Free pages are kept as sorted runs, and a reservation takes whole runs where it can: neighbouring pages lie
    side by side in memory, and reading them is a plain stream.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.num_pages = num_pages
        self._free: list[tuple[int, int]] = [(0, num_pages)]  # (first page, count), sorted, never touching
        self._num_holders: dict[PageLease, int] = {}

    @property
    def num_free(self) -> int:
        """Pages without a holder."""
        return sum(count for _, count in self._free)

    @property
    def num_used(self) -> int:
        """Pages that requests hold."""
        return self.num_pages - self.num_free

    def reserve(self, owner: str, num_pages: int) -> PageLease | None:
        """Take pages, all or none, for one holder; None where fewer are free."""
        if num_pages > self.num_free:
            return None
        lease = PageLease(owner, tuple(self._take(num_pages)))
        self._num_holders[lease] = 1
        return lease

    def retain(self, lease: PageLease) -> None:
        """Add a holder.

        Raises:
            KeyError: nobody holds them.
        """
        self._num_holders[lease] += 1

    def release(self, lease: PageLease) -> bool:
        """Remove a holder.

        Returns:
            Whether it was the last one, so that the pages are free.

        Raises:
            KeyError: nobody holds them.
        """
        self._num_holders[lease] -= 1
        if self._num_holders[lease]:
            return False
        del self._num_holders[lease]
        for start, count in lease.runs:
            self._put(start, count)
        return True

    def check_integrity(self) -> None:
        """Every page is free or in exactly one lease that somebody holds; true after every call."""
        assert self._free == sorted(self._free), "free runs out of order"
        assert all(a + n < b for (a, n), (b, _) in zip(self._free, self._free[1:], strict=False)), "free runs touch"
        assert all(count > 0 for count in self._num_holders.values()), "a lease without a holder"
        next_page = 0
        for start, count in sorted([*self._free, *(run for lease in self._num_holders for run in lease.runs)]):
            assert start == next_page, "a page is lost or held twice"
            assert count > 0, "a run of no pages"
            next_page = start + count
        assert next_page == self.num_pages, "a page is lost"

    def _take(self, num_pages: int) -> list[tuple[int, int]]:
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
        index = bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + count:
            count += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == start:
            previous_start, previous_count = self._free[index - 1]
            self._free[index - 1] = (previous_start, previous_count + count)
        else:
            self._free.insert(index, (start, count))
