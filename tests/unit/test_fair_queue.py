"""Clients take turns: whoever comes waits for one item of each other client, and for its own."""

from hypothesis import given
from hypothesis import strategies as st

from colm.fair_queue import FairQueue

ARRIVALS = st.lists(st.integers(0, 3), max_size=40)


@given(ARRIVALS)
def test_a_round_has_one_item_of_each_client_in_order_of_arrival(clients: list[int]) -> None:
    """Against rounds that are lists: the nth item of a client is in the nth round."""
    queue: FairQueue[int] = FairQueue()
    rounds: list[list[int]] = [[] for _ in clients]
    for item, client in enumerate(clients):
        queue.add(item, client)
        rounds[clients[:item].count(client)].append(item)
    expected = [item for each in rounds for item in each]
    assert list(queue) == expected
    assert [queue.index(item) for item in expected] == list(range(len(expected)))
    for item in expected:
        assert queue.first == item
        queue.remove(item)
    assert not queue


@given(before=ARRIVALS, num_served=st.integers(0, 40), others=ARRIVALS)
def test_a_newcomer_waits_for_no_more_than_a_round(before: list[int], num_served: int, others: list[int]) -> None:
    """However many items of other clients came before it, and whoever comes after it."""
    queue: FairQueue[int] = FairQueue()
    for item, client in enumerate(before):
        queue.add(item, client)
    for _ in range(min(num_served, len(queue))):
        queue.remove(queue.first)
    queue.add(-1, "newcomer")
    assert queue.index(-1) <= 2 * 4 - 1  # the round that is being served may have begun before
    for item, client in enumerate(others, start=len(before)):
        queue.add(item, client)
    num_before = 0
    while queue.first != -1:
        queue.remove(queue.first)
        num_before += 1
    assert num_before <= 2 * 4 - 1


@given(ARRIVALS, st.data())
def test_who_leaves_early_moves_nobody_back(clients: list[int], data: st.DataObject) -> None:
    queue: FairQueue[int] = FairQueue()
    for item, client in enumerate(clients):
        queue.add(item, client)
    while len(queue):
        order = list(queue)
        leaving = data.draw(st.sampled_from(order))
        queue.remove(leaving)
        order.remove(leaving)
        assert list(queue) == order


class Plain:
    """The queue by its definition: every item's round and number of arrival, looked through each time."""

    def __init__(self) -> None:
        self.keys: dict[int, tuple[int, int, int]] = {}  # round, arrival, client
        self.served_round = 0

    def order(self) -> list[int]:
        return sorted(self.keys, key=self.keys.__getitem__)

    def add(self, item: int, client: int) -> None:
        own = [of_round for of_round, _, each in self.keys.values() if each == client]
        self.keys[item] = max(own, default=self.served_round) + 1, item, client

    def remove(self, item: int) -> None:
        if self.order()[0] == item:
            self.served_round = self.keys[item][0]
        del self.keys[item]


@given(st.lists(st.integers(0, 3) | st.floats(0, 1, exclude_max=True), max_size=60))
def test_arrivals_and_departures_in_any_order_leave_the_order_of_the_definition(happenings: list[float]) -> None:
    """A whole number is the client of a newcomer, a part where in the line somebody leaves."""
    queue, plain = FairQueue[int](), Plain()
    for number, what in enumerate(happenings):
        if isinstance(what, int):
            queue.add(number, what)
            plain.add(number, what)
        elif plain.keys:
            leaving = plain.order()[int(what * len(plain.keys))]
            queue.remove(leaving)
            plain.remove(leaving)
        order = plain.order()
        assert list(queue) == order
        assert [queue.index(item) for item in order] == list(range(len(order)))
        assert queue.some_behind(1, 2) == order[1:3]


def test_one_client_alone_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.add(item)
    queue.remove("a")
    queue.add("d")
    assert list(queue) == ["b", "c", "d"]
    assert "a" not in queue
    assert "d" in queue
    queue.clear()
    assert not list(queue)
