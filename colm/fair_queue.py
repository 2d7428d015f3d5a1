"""A queue in which clients take turns: first come, first served among one client's own, and one of each in a round."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)


class FairQueue(Generic[_T]):
    """Items in the order of rounds, and within a round in the order of arrival.

    A client's next item belongs to the round after that of its last one, and at the earliest to the round after the one
    that is being served (start-time fair queueing with items of one size). So many items of one client stand behind one
    item of each other client, whenever that comes.
    """

    def __init__(self) -> None:
        self._rounds: dict[_T, tuple[int, int]] = {}
        """Each item's round and number of arrival."""
        self._clients: dict[_T, Hashable] = {}
        self._served_round = 0
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._rounds)

    def __contains__(self, item: object) -> bool:
        return item in self._rounds

    def __iter__(self) -> Iterator[_T]:
        return iter(sorted(self._rounds, key=self._rounds.__getitem__))

    def index(self, item: _T) -> int:
        """How many stand before it."""
        mine = self._rounds[item]
        return sum(each < mine for each in self._rounds.values())

    @property
    def first(self) -> _T:
        """Whose turn it is; there must be somebody."""
        return min(self._rounds, key=self._rounds.__getitem__)

    def add(self, item: _T, client: Hashable = None) -> None:
        """Let an item wait its client's turn."""
        own = (of_round for each, (of_round, _) in self._rounds.items() if self._clients[each] == client)
        self._rounds[item] = max(own, default=self._served_round) + 1, self._num_arrived
        self._clients[item] = client
        self._num_arrived += 1

    def remove(self, item: _T) -> None:
        """Take an item out; if it was the first, it has had its turn."""
        if self.first == item:
            self._served_round = self._rounds[item][0]
        del self._rounds[item], self._clients[item]

    def clear(self) -> None:
        """Take everything out."""
        self._rounds.clear()
        self._clients.clear()
