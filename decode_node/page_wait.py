"""Estimates how long a request waits for pages, from when those who have some let go of them. No asyncio, no clock."""

from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from decode_node.page_pool import PageBlock, PageLease

_NUM_RECENT: Final = 8
"""Prefills by which the next ones are estimated."""


class PrefillPace:
    """How long a prompt's keys and values take to come, as those of the last prompts did."""

    def __init__(self) -> None:
        self._recent = deque[tuple[int, float]](maxlen=_NUM_RECENT)

    def note(self, num_tokens: int, seconds: float) -> None:
        """Learn from a prompt of which a prefill node has computed so many tokens."""
        if num_tokens:
            self._recent.append((num_tokens, seconds))

    def seconds(self, num_tokens: int) -> float:
        """Of so many tokens; infinite while nobody knows."""
        if not num_tokens:
            return 0.0
        if not self._recent:
            return inf
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        return float(num_tokens * seconds / tokens)


def page_wait_s(
    num_available: int, held: Iterable[tuple[PageLease, float]], in_line: Sequence[tuple[int, float]]
) -> float | None:
    """When the last in line gets its pages, if everybody takes as long as is thought, and nobody else comes.

    Nobody overtakes: each waits for its pages and for those before it, and then has them for its own time.

    Args:
        num_available: pages that can be had now.
        held: the others' leases, and after how many seconds each ends; infinite where nobody can tell. A block that
            several have is free with the last of them.
        in_line: pages that each needs, and for how many seconds, in the order of their turns.

    Returns:
        Seconds; None where it waits for somebody of whom nobody can tell.
    """
    free_at_s: dict[PageBlock, float] = {}
    for lease, end_s in held:
        for block in lease.blocks:
            free_at_s[block] = max(free_at_s.get(block, 0.0), end_s)
    coming = [(end_s, block.num_pages) for block, end_s in free_at_s.items()]
    heapify(coming)
    now_s = 0.0
    for num_pages, for_s in in_line:
        while num_available < num_pages:
            if not coming:
                return None
            end_s, num_free = heappop(coming)
            now_s = max(now_s, end_s)
            num_available += num_free
        num_available -= num_pages
        heappush(coming, (now_s + for_s, num_pages))
    return None if now_s == inf else now_s
