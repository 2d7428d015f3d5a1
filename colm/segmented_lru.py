"""Which of the things that a cache keeps make way first: those that were never wanted again, then the least recent."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Generic, TypeVar

PROTECTED_SHARE = 0.8
"""Of a cache's budget, for what was wanted again; what is beyond goes back to the others."""

K = TypeVar("K", bound=Hashable)


class SegmentedLru(Generic[K]):
    """Two lists, each with the least recently used first: new things on probation, and those that were used again.

    Things that come once push each other out, and nothing else.

    Args:
        budget: of the cache, in the unit of its things' sizes.
    """

    def __init__(self, budget: int) -> None:
        self._max_protected_size = PROTECTED_SHARE * budget
        self._protected_size = 0
        self._on_probation: OrderedDict[K, int] = OrderedDict()
        self._protected: OrderedDict[K, int] = OrderedDict()

    def __iter__(self) -> Iterator[K]:
        """All of them, those first that should make way first."""
        return chain(self._on_probation, self._protected)

    @property
    def on_probation(self) -> Iterator[K]:
        """Those that new things may push out, the oldest first."""
        return iter(self._on_probation)

    def add(self, thing: K, size: int) -> None:
        """Note a new one."""
        self._on_probation[thing] = size

    def use(self, thing: K) -> None:
        """Note that one was wanted again."""
        if (size := self._on_probation.pop(thing, None)) is not None:
            self._protected[thing] = size
            self._protected_size += size
        self._protected.move_to_end(thing)
        while self._protected_size > self._max_protected_size:
            demoted, size = self._protected.popitem(last=False)
            self._protected_size -= size
            self._on_probation[demoted] = size

    def refresh(self, thing: K) -> None:
        """Make one the newest of its list: it came once more, but nobody wanted it."""
        (self._on_probation if thing in self._on_probation else self._protected).move_to_end(thing)

    def remove(self, thing: K) -> None:
        """Forget one."""
        if self._on_probation.pop(thing, None) is None:
            self._protected_size -= self._protected.pop(thing)

    def check_integrity(self) -> None:
        """True after every call."""
        assert not self._on_probation.keys() & self._protected.keys(), "a thing in two lists"
        assert self._protected_size == sum(self._protected.values()) <= self._max_protected_size
