"""Work that stands still is noticed, and nothing else is taken for that."""

import pytest

from colm.watch import STUCK_AFTER_S, Watch
from tests.clock import FakeClock

LOOKS = round(STUCK_AFTER_S)


class Watched:
    """A watch that is looked at once a second."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.mark: int | None = None
        self.watch = Watch(self.clock, lambda: self.mark)

    def look(self, times: int, after_s: float = 1.0) -> list[bool]:
        said = []
        for _ in range(times):
            self.clock.now_s += after_s
            said.append(self.watch.goes_on())
        return said


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_who_has_nothing_to_do_is_well(watched: Watched) -> None:
    assert all(watched.look(10 * LOOKS))


def test_work_that_stands_still_is_stuck_after_a_minute_and_well_with_its_next_step(watched: Watched) -> None:
    watched.mark = 7
    assert watched.look(LOOKS + 1) == [True] * LOOKS + [False]
    watched.mark = 8
    assert all(watched.look(LOOKS))


def test_work_that_goes_on_slowly_is_well(watched: Watched) -> None:
    for step in range(5):
        watched.mark = step
        assert all(watched.look(LOOKS))


def test_work_that_begins_where_the_last_one_ended_has_its_own_minute(watched: Watched) -> None:
    watched.mark = 3
    watched.look(LOOKS - 1)
    watched.mark = None
    watched.look(1)
    watched.mark = 3
    assert all(watched.look(LOOKS))


def test_a_process_that_was_stopped_itself_is_not_taken_for_stuck(watched: Watched) -> None:
    watched.mark = 3
    assert all(watched.look(3, after_s=1000.0))
    assert not all(watched.look(LOOKS))
