"""What a pool wants: soon more, late fewer, nothing for a replica that is lost, and no to and fro."""

import math
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling.policy import DOWN_SHARE, PoolScaler, ScalingLimits, decode_demand, prefill_demand
from tests.clock import FakeClock

LIMITS = ScalingLimits(min_replicas=1, max_replicas=4)
UP_S, DOWN_S = LIMITS.up_s, LIMITS.down_s


class Pool:
    """A pool that is looked at every second; as many replicas are present as are wanted, but those that are lost."""

    def __init__(self, limits: ScalingLimits = LIMITS) -> None:
        self.clock = FakeClock()
        self.scaler = PoolScaler(limits, self.clock.now())
        self.num_lost = 0

    def see(self, demand: float, seconds: float, every_s: float = 1.0) -> list[int]:
        """Wanted replicas at each look."""
        wanted = []
        for _ in range(round(seconds / every_s)):
            self.clock.now_s += every_s
            present = self.scaler.num_wanted - self.num_lost
            wanted.append(self.scaler.observe(self.clock.now(), demand=demand, num_present=present))
        return wanted


def changes(wanted: Iterable[int]) -> list[int]:
    return [after - before for before, after in pairwise(wanted) if after != before]


def test_a_step_up_is_followed_within_the_look_back_for_more() -> None:
    wanted = Pool().see(2.5, UP_S)
    assert wanted[0] == 1
    assert wanted[-1] == 3
    assert all(change > 0 for change in changes(wanted))


def test_a_step_down_is_followed_once_the_look_back_for_fewer_is_over() -> None:
    pool = Pool()
    pool.see(2.5, UP_S)
    wanted = pool.see(0.3, DOWN_S + UP_S)
    assert wanted[: int(DOWN_S) - 1] == [3] * (int(DOWN_S) - 1)
    assert wanted[-1] == 1


@pytest.mark.parametrize(("demand", "stay"), [(1.5, 2), (1.7, 3), (0.75, 1), (0.85, 2)])
def test_those_that_stay_must_carry_the_load_with_room(demand: float, stay: int) -> None:
    pool = Pool()
    pool.see(2.5, UP_S)
    assert pool.see(demand, 2 * DOWN_S)[-1] == stay


@pytest.mark.parametrize(("demand", "seconds", "most"), [(3.0, 9.0, 1), (3.0, 11.0, 2), (100.0, 1.0, 4)])
def test_a_burst_counts_for_as_long_as_it_lasts(demand: float, seconds: float, most: int) -> None:
    pool = Pool()
    assert max(pool.see(demand, seconds) + pool.see(0.0, UP_S)) == most


def test_a_load_that_comes_and_goes_within_the_look_back_keeps_its_replicas() -> None:
    pool = Pool()
    wanted = [each for _ in range(6) for demand in (1.8, 0.0) for each in pool.see(demand, DOWN_S / 2)]
    assert changes(wanted) == [1]


def test_what_is_seen_while_a_replica_is_lost_does_not_scale_up() -> None:
    pool = Pool()
    pool.see(1.5, UP_S)
    pool.num_lost = 1
    assert pool.see(3.9, 10 * UP_S) == [2] * int(10 * UP_S)
    pool.num_lost = 0
    assert pool.see(1.9, 2 * UP_S)[-1] == 2
    assert pool.see(3.9, UP_S)[-1] == 4


def test_replicas_that_still_start_are_not_lost() -> None:
    """Else a pool would grow by one each time that a model is loaded."""
    clock = FakeClock()
    scaler = PoolScaler(LIMITS, clock.now())
    for _ in range(int(UP_S)):
        clock.now_s += 1
        wanted = scaler.observe(clock.now(), demand=3.5, num_present=1)
    assert wanted == 4


def test_where_none_can_be_placed_the_load_that_goes_away_is_followed() -> None:
    pool = Pool()
    pool.see(3.5, UP_S)
    pool.num_lost = 2
    assert pool.see(0.5, DOWN_S + 2 * UP_S)[-1] == 1


def test_a_scaler_that_begins_anew_keeps_what_is_wanted_for_the_look_back() -> None:
    scaler = PoolScaler(LIMITS, 0.0, 3)
    looks = [scaler.observe(float(now_s), demand=0.0, num_present=3) for now_s in range(1, int(DOWN_S) + 1)]
    assert set(looks[:-1]) == {3}
    assert looks[-1] == 1
    assert PoolScaler(LIMITS, 0.0, 9).num_wanted == 4


@pytest.mark.parametrize("offered", [0.2, 0.79, 0.95, 1.0, 1.2, 1.5, 2.3, 3.1, 3.9, 6.0])
@pytest.mark.parametrize("start_s", [0, 20, 90])
def test_a_steady_load_is_risen_to_and_then_settled_into(offered: float, start_s: int) -> None:
    """In a closed loop: replicas that come late work the queue off, and must not go since there is none then."""
    scaler, queued_s, ready_s, wanted = PoolScaler(LIMITS, 0.0), 0.0, [0.0], [1]
    for now_s in range(5, 2 * 3600, 5):
        num_present = sum(at_s <= now_s for at_s in ready_s)
        num_busy = min(num_present, queued_s / 5 + offered)
        queued_s += 5 * (offered - num_busy)
        demand = prefill_demand(queued_s=queued_s, num_prompts=100, num_busy=num_busy, target_queue_s=10)
        wanted.append(scaler.observe(now_s, demand=demand, num_present=num_present))
        ready_s = (ready_s + [now_s + start_s] * wanted[-1])[: wanted[-1]]
    most_at = wanted.index(max(wanted))
    assert all(change > 0 for change in changes(wanted[:most_at]))
    assert all(change < 0 for change in changes(wanted[most_at:]))
    assert min(4, math.ceil(offered)) <= wanted[-1] <= min(4, math.ceil(offered / DOWN_SHARE))
    assert queued_s < 10 * wanted[-1] or offered > 4


LOOKS = st.lists(st.tuples(st.floats(0.1, 120.0), st.floats(0.0, 10.0), st.integers(0, 5)), min_size=1, max_size=60)


@given(LOOKS, st.integers(1, 4), st.integers(1, 4))
def test_whatever_is_seen_the_limits_hold_and_no_fall_follows_a_rise_within_the_look_back(
    looks: list[tuple[float, float, int]], least: int, num_wanted: int
) -> None:
    limits = ScalingLimits(min_replicas=least, max_replicas=4, up_s=10.0, down_s=60.0)
    scaler, now_s, rose_s = PoolScaler(limits, 0.0, num_wanted), 0.0, -math.inf
    for taken_s, demand, num_present in looks:
        before, now_s = scaler.num_wanted, now_s + taken_s
        wanted = scaler.observe(now_s, demand=demand, num_present=num_present)
        assert least <= wanted <= 4
        if wanted > before:
            rose_s = now_s
        if wanted < before:
            assert now_s - rose_s > limits.down_s
            assert now_s >= limits.down_s


@given(st.floats(0.0, 5.0), st.lists(st.floats(0.1, 5.0), min_size=1, max_size=80), st.integers(1, 4))
def test_a_demand_that_stands_still_moves_the_number_in_one_direction(
    demand: float, steps_s: list[float], num_wanted: int
) -> None:
    scaler, now_s = PoolScaler(ScalingLimits(min_replicas=1, max_replicas=4, up_s=5, down_s=20), 0.0, num_wanted), 0.0
    wanted = [num_wanted]
    for step_s in steps_s:
        now_s += step_s
        wanted.append(scaler.observe(now_s, demand=demand, num_present=wanted[-1]))
    assert wanted in (sorted(wanted), sorted(wanted, reverse=True))
    if now_s > 30:
        assert demand <= wanted[-1] or wanted[-1] == 4
        assert wanted[-1] in (1, num_wanted) or demand > DOWN_SHARE * (wanted[-1] - 1) - 1e-6


def test_a_queue_asks_for_as_many_engines_as_there_are_prompts_at_most() -> None:
    assert prefill_demand(queued_s=600.0, num_prompts=1, num_busy=1.0, target_queue_s=10.0) == 1.0
    assert prefill_demand(queued_s=600.0, num_prompts=5, num_busy=1.0, target_queue_s=10.0) == 5.0
    assert prefill_demand(queued_s=25.0, num_prompts=9, num_busy=1.0, target_queue_s=10.0) == 2.5
    assert prefill_demand(queued_s=0.0, num_prompts=0, num_busy=1.7, target_queue_s=10.0) == 1.7


def test_pages_or_places_ask_for_decode_replicas_whichever_is_more() -> None:
    def demand(num_pages: int, num_requests: int) -> float:
        return decode_demand(
            num_pages=num_pages,
            pages_per_replica=100,
            num_requests=num_requests,
            places_per_replica=10,
            target_use=0.8,
        )

    assert demand(120, 2) == pytest.approx(1.5)
    assert demand(10, 20) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("said", "least", "most", "up_s", "down_s"),
    [
        ("max_replicas=1", 2, 1, 30, 600),
        ("min_replicas=0", 0, 1, 30, 600),
        ("up_s=0", 1, 2, 0, 600),
        ("down_s=5", 1, 2, 30, 5),
    ],
)
def test_limits_that_contradict_are_refused_by_name(
    said: str, least: int, most: int, up_s: float, down_s: float
) -> None:
    with pytest.raises(ValueError, match=said):
        ScalingLimits(min_replicas=least, max_replicas=most, up_s=up_s, down_s=down_s)
