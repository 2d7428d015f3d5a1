"""A queue in which clients take turns: first come, first served among one client's own, and one of each in a round."""

from bisect import bisect_left, insort
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
        self._order: list[tuple[int, int, _T]] = []
        """Round, number of arrival, item; ascending, and no two have the same number."""
        self._keys: dict[_T, tuple[int, int]] = {}
        self._clients: dict[_T, Hashable] = {}
        self._of_client: dict[Hashable, dict[_T, None]] = {}
        """Each client's, in the order of arrival, which is that of their rounds."""
        self._served_round = 0
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, item: object) -> bool:
        return item in self._keys

    def __iter__(self) -> Iterator[_T]:
        return (item for _, _, item in self._order)

    def index(self, item: _T) -> int:
        """How many stand before it."""
        return bisect_left(self._order, self._keys[item])  # a pair is less than what it begins

    def some_behind(self, index: int, most: int) -> list[_T]:
        """The items from a place on, so many at most."""
        return [item for _, _, item in self._order[index : index + most]]

    @property
    def first(self) -> _T:
        """Whose turn it is; there must be somebody."""
        return self._order[0][2]

    def add(self, item: _T, client: Hashable = None) -> None:
        """Let an item wait its client's turn."""
        own = self._of_client.setdefault(client, {})
        last_round = self._keys[next(reversed(own))][0] if own else self._served_round
        self._keys[item] = key = last_round + 1, self._num_arrived
        insort(self._order, (*key, item))
        own[item] = None
        self._clients[item] = client
        self._num_arrived += 1

    def remove(self, item: _T) -> None:
        """Take an item out; if it was the first, it has had its turn."""
        if (index := self.index(item)) == 0:
            self._served_round = self._keys[item][0]
        del self._order[index], self._keys[item]
        own = self._of_client[client := self._clients.pop(item)]
        del own[item]
        if not own:
            del self._of_client[client]

    def clear(self) -> None:
        """Take everything out."""
        self._order.clear()
        self._keys.clear()
        self._clients.clear()
        self._of_client.clear()
