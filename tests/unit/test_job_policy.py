"""Whose steps are next and who shares them: the shortest work, a share for the first in line, never too much memory."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_node.job_policy import (
    FIRST_SHARE,
    SLOWDOWN,
    Wait,
    charge,
    companions,
    job_in_the_way,
    may_begin,
    next_job,
    wait_of,
)

ENOUGH = 1000


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    place: int
    remaining_s: float = 10.0
    shared_s: float = 5.0
    layer: int = 0
    tile_rows: int | None = None
    memory_bytes: int = 1
    is_started: bool = False
    is_computed: bool = False
    has_reader: bool = True
    has_room: bool = True
    owed_s: float = 0.0


@st.composite
def lines(draw: st.DrawFn) -> list[Job]:
    places = draw(st.lists(st.integers(0, 20), unique=True, max_size=6))
    flags = {name: st.booleans() for name in ("is_started", "is_computed", "has_reader", "has_room")}
    numbers = {
        "remaining_s": st.floats(0.1, 100.0),
        "shared_s": st.floats(0.0, 0.1),
        "layer": st.integers(0, 1),
        "tile_rows": st.sampled_from([None, 1, 2, 3]),
        "memory_bytes": st.integers(1, 4),
        "owed_s": st.floats(-1.0, 1.0),
    }
    jobs = [draw(st.builds(Job, place=st.just(place), **flags, **numbers)) for place in places]
    return [replace(job, is_started=True) if job.is_computed else job for job in jobs]


def test_the_shortest_remaining_work_goes_first_and_of_equals_the_first_in_line() -> None:
    long, first, second = Job(place=0, remaining_s=9.0), Job(place=1, remaining_s=2.0), Job(place=2, remaining_s=2.0)
    assert next_job([second, long, first], memory_bytes=ENOUGH) is first


def test_the_first_in_line_goes_on_where_it_is_owed_time() -> None:
    first, second = Job(place=1, is_started=True, owed_s=0.1), Job(place=2, remaining_s=0.1)
    assert next_job([second, first], memory_bytes=ENOUGH) is first


@pytest.mark.parametrize("trouble", [{"has_room": False}, {"has_reader": False}, {"is_computed": True}])
def test_the_next_one_begins_where_the_first_has_no_use_for_the_engine(trouble: dict[str, bool]) -> None:
    first, second = Job(place=1, is_started=True, owed_s=1.0, **trouble), Job(place=2)
    assert next_job([first, second], memory_bytes=ENOUGH) is second


def test_nobody_begins_without_memory() -> None:
    first, second = Job(place=1, is_started=True, has_room=False, memory_bytes=3), Job(place=2, memory_bytes=2)
    assert next_job([first, second], memory_bytes=4) is None
    assert next_job([first, second], memory_bytes=5) is second


def test_nobody_begins_in_the_memory_that_the_first_in_line_is_owed() -> None:
    runs, large, small = Job(place=5, is_started=True), Job(place=1, memory_bytes=4, owed_s=0.1), Job(place=6)
    small.remaining_s = 1.0
    assert next_job([runs, large, small], memory_bytes=4) is runs
    large.owed_s = 0.0
    assert next_job([runs, large, small], memory_bytes=4) is small
    large.owed_s, runs.has_room = 0.1, False
    assert next_job([runs, large, small], memory_bytes=4) is None
    assert next_job([large, small], memory_bytes=4) is large


def test_what_is_kept_whole_begins_in_the_memory_that_nobody_before_it_is_owed() -> None:
    runs, first, kept = Job(place=0, is_started=True), Job(place=1, memory_bytes=4), Job(place=2, is_computed=True)
    jobs = [runs, first, kept]
    assert may_begin(kept, jobs, memory_bytes=2)
    assert not may_begin(kept, jobs, memory_bytes=1)
    first.owed_s = 0.1
    assert not may_begin(kept, jobs, memory_bytes=5)
    assert may_begin(kept, jobs, memory_bytes=6)
    first.place = 3
    assert may_begin(kept, jobs, memory_bytes=2)


def test_who_comes_later_leaves_what_is_kept_whole_its_memory() -> None:
    """It needs no engine, and so is never the first in line; without this it could wait for ever."""
    kept, later = Job(place=1, is_computed=True, memory_bytes=2), Job(place=2)
    assert next_job([kept, later], memory_bytes=2) is None
    assert next_job([kept, later], memory_bytes=3) is later
    later.place = 0
    assert next_job([kept, later], memory_bytes=2) is later


@given(lines(), st.integers(1, 12))
def test_the_choice_can_use_the_engine_and_has_its_memory(jobs: list[Job], memory_bytes: int) -> None:
    chosen = next_job(jobs, memory_bytes=memory_bytes)
    held_bytes = sum(job.memory_bytes for job in jobs if job.is_started)
    able = [job for job in jobs if job.has_reader and job.has_room and not job.is_computed]
    able = [job for job in able if job.is_started or held_bytes + job.memory_bytes <= memory_bytes]
    assert chosen is None or chosen in able
    if chosen is None and able:
        wanting = [job for job in jobs if job.has_reader and job.has_room and not job.is_computed]
        first = min(wanting, key=lambda job: job.place)
        assert first.owed_s > 0
        assert first not in able


@given(lines(), st.integers(1, 12))
def test_what_is_in_the_way_has_no_reader_and_giving_all_of_it_up_lets_another_begin(
    jobs: list[Job], memory_bytes: int
) -> None:
    jobs = [job if job.is_started else replace(job, has_room=True) for job in jobs]
    memory_bytes += sum(job.memory_bytes for job in jobs if job.has_reader)
    while next_job(jobs, memory_bytes=memory_bytes) is None and (idle := job_in_the_way(jobs)) is not None:
        assert idle.is_started
        assert not idle.has_reader
        jobs.remove(idle)
    if any(job.has_reader and not job.is_started for job in jobs):
        assert next_job(jobs, memory_bytes=memory_bytes) is not None


def sharing(place: int, **fields: Any) -> Job:
    """A job whose steps may be shared, of 10 seconds, half of them the steps' own price."""
    return Job(place=place, **{"tile_rows": 10, **fields})


def shares(chosen: Job, *others: Job, memory_bytes: int = ENOUGH, tile_tokens: int = 1000) -> list[Job]:
    return companions(chosen, [chosen, *others], memory_bytes=memory_bytes, tile_tokens=tile_tokens)


def test_steps_are_shared_by_whole_prompts_at_the_same_layer_in_the_order_of_the_policy() -> None:
    chosen, second, third = sharing(3, remaining_s=100.0), sharing(5, remaining_s=6.0), sharing(1)
    others = [second, third, sharing(6, layer=1), sharing(7, tile_rows=None), sharing(8, has_reader=False)]
    assert shares(chosen, *others) == [second, third]
    assert shares(Job(place=3), *others) == []


def test_the_first_in_line_pays_for_its_share_of_a_shared_step_with_what_its_own_step_brings() -> None:
    first, other = sharing(0, owed_s=-1.0), sharing(1)
    charge([first, other], {other: 1.5, first: 1.0}, 2.0)
    assert first.owed_s == pytest.approx(FIRST_SHARE * 2.0 - 1.0)
    charge([first, other], {other: 1.5}, 1.5)
    assert first.owed_s == pytest.approx(FIRST_SHARE * 3.5 - 1.0)
    assert other.owed_s == 0.0


def test_a_shared_step_has_no_more_rows_than_a_tile() -> None:
    chosen, second, third, fourth = sharing(0), sharing(1), sharing(2, tile_rows=21), sharing(3)
    chosen.remaining_s = 30.0
    assert shares(chosen, second, third, fourth, tile_tokens=40) == [second, fourth]


def test_companions_slow_nobody_down_by_more_than_that() -> None:
    """Each adds 5 seconds: two of them to ten seconds, and to six only one."""
    others = [sharing(place) for place in (1, 2, 3)]
    assert shares(sharing(0), *others) == others[:2]
    assert shares(sharing(0, remaining_s=6.0), *others) == others[:1]


def test_companions_begin_in_the_memory_that_there_is_and_not_in_what_the_first_in_line_is_owed() -> None:
    chosen, large, small = sharing(5, memory_bytes=2), sharing(6, memory_bytes=3), sharing(7)
    assert shares(chosen, large, small, memory_bytes=4) == [small]
    assert shares(replace(chosen, is_started=True), large, small, memory_bytes=4) == [small]
    owed = Job(place=0, memory_bytes=4, owed_s=0.1)
    begun = sharing(8, is_started=True)
    assert shares(replace(chosen, is_started=True), small, begun, owed, memory_bytes=5) == [begun]


@given(lines(), st.integers(1, 12), st.integers(1, 8))
def test_whoever_can_share_a_step_does_and_nobody_else(jobs: list[Job], memory_bytes: int, tile_tokens: int) -> None:
    chosen = next_job(jobs, memory_bytes=memory_bytes)
    if chosen is None or (chosen.tile_rows or 0) > tile_tokens:
        return
    joined = companions(chosen, jobs, memory_bytes=memory_bytes, tile_tokens=tile_tokens)
    together = [chosen, *joined]
    assert len({job.place for job in together}) == len(together)
    able = [job for job in jobs if job.has_reader and job.has_room and not job.is_computed]
    first = min(able, key=lambda job: job.place)

    def fits(members: list[Job]) -> bool:
        held = [job for job in jobs if job.is_started or job in members]
        added_s = sum(job.remaining_s - job.shared_s for job in members[1:])
        return (
            all(job in able and job.tile_rows is not None and job.layer == chosen.layer for job in members)
            and sum(job.tile_rows or 0 for job in members) <= tile_tokens
            and added_s <= (SLOWDOWN - 1) * chosen.remaining_s + 1e-9
            and all(job.is_started for job in members) | (sum(job.memory_bytes for job in held) <= memory_bytes)
            and (first is chosen or first.owed_s <= 0 or all(job.is_started for job in members))
        )

    assert not joined or fits(together)
    for job in able:
        if job not in together and fits([*together, job]):
            # Only for want of what those that came before it in the line took.
            assert not fits([*together[: 1 + sum(j.remaining_s <= job.remaining_s for j in joined)], job])


def test_a_job_without_a_reader_is_in_nobodys_way_while_nobody_waits() -> None:
    assert job_in_the_way([Job(place=1, is_started=True, has_reader=False)]) is None


def test_a_job_with_a_reader_is_never_in_the_way() -> None:
    slow = Job(place=1, is_started=True, has_room=False)
    assert job_in_the_way([slow, Job(place=2)]) is None


# How a simulated engine is used: each entry is one of its steps, with the works that arrive while it is made.
STEP_S = st.floats(0.01, 1.0)
NUM_LAYERS, PRICE_S, TILE_TOKENS = 4, 0.2, 8
LONG = st.tuples(st.floats(0.01, 20.0), STEP_S)
SHORT = st.tuples(st.floats(0.01, 0.3), st.integers(1, TILE_TOKENS))
"""What one of its steps adds to those of others, and its rows."""
ARRIVALS = st.lists(st.lists(st.one_of(LONG, SHORT), max_size=2), max_size=150)
LONGEST_STEP_S = 1.0  # a short one's own is half a second at most, and shared twice that


class Engine:
    """Makes steps as the policy says; every job has steps of a length of its own, short ones share theirs."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.jobs: list[Job] = []
        self.step_of: dict[Job, float] = {}
        self.ends_by_s: dict[Job, float] = {}

    def arrive(self, what: tuple[float, float] | tuple[float, int]) -> None:
        match what:
            case (added_s, int() as rows):
                step_s = PRICE_S + added_s
                times = {"remaining_s": NUM_LAYERS * step_s, "shared_s": NUM_LAYERS * PRICE_S}
                job = Job(place=len(self.step_of), tile_rows=rows, **times)
            case (remaining_s, step_s):
                job = Job(place=len(self.step_of), remaining_s=remaining_s)
        before = [*self.jobs, job]
        self.step_of[job] = step_s
        # The longest step that anybody may make, for each of those before it and for itself.
        promised_s = sum(each.remaining_s for each in before) / FIRST_SHARE + len(before) * LONGEST_STEP_S
        self.ends_by_s[job] = self.now_s + promised_s
        self.jobs.append(job)

    def step(self) -> list[Job]:
        chosen = next_job(self.jobs, memory_bytes=ENOUGH)
        if chosen is None:
            return []
        stepping = [chosen, *companions(chosen, self.jobs, memory_bytes=ENOUGH, tile_tokens=TILE_TOKENS)]
        own_s = {job: min(self.step_of[job], job.remaining_s) for job in stepping}
        step_s = sum(own_s.values()) - (len(stepping) - 1) * PRICE_S
        assert step_s <= LONGEST_STEP_S + 1e-6
        charge(self.jobs, own_s, step_s)
        self.now_s += step_s
        for job in stepping:
            job.remaining_s -= own_s[job]
            job.shared_s, job.layer = job.shared_s - PRICE_S, job.layer + 1
            job.is_started, job.is_computed = True, job.remaining_s <= 1e-9
            if job.is_computed:
                self.jobs.remove(job)
                assert self.now_s <= self.ends_by_s[job] + 1e-6
        return stepping


@given(ARRIVALS)
def test_every_job_has_ended_in_time_whatever_arrives(arrivals: list[list[tuple[float, float]]]) -> None:
    engine = Engine()
    for works in arrivals:
        for work in works:
            engine.arrive(work)
        engine.step()
    while engine.step():
        pass
    assert not engine.jobs


@given(ARRIVALS)
def test_the_shortest_job_begins_when_the_first_in_line_has_had_what_it_is_owed(
    arrivals: list[list[tuple[float, float]]],
) -> None:
    engine = Engine()
    for works in arrivals:
        for work in works:
            engine.arrive(work)
        engine.step()
    engine.arrive((0.001, 0.001))
    shortest, came_s = engine.jobs[-1], engine.now_s
    if shortest is min(engine.jobs, key=lambda job: job.remaining_s):
        while shortest not in engine.step():
            assert engine.now_s - came_s <= 2 * LONGEST_STEP_S


def test_a_long_job_ends_in_time_under_a_flood_of_short_ones() -> None:
    engine = Engine()
    engine.arrive((20.0, 1.0))
    (long,) = engine.jobs
    for _ in range(10_000):
        engine.arrive((0.1, 0.1))
        engine.step()
        if long.is_computed:
            break
    assert long.is_computed
    assert engine.now_s > 20.0 / FIRST_SHARE / 2, "the flood had its share as well"


@given(st.integers(0, 30), st.lists(st.floats(0.01, 0.9), min_size=1, max_size=5), STEP_S)
def test_short_jobs_that_arrive_while_a_long_one_runs_begin_after_its_step(
    num_steps: int, shorts: list[float], step_s: float
) -> None:
    engine = Engine()
    engine.arrive((50.0, step_s))
    for _ in range(1 + num_steps):
        engine.step()
    engine.arrive((min(shorts), 0.01))
    short = engine.jobs[-1]
    for other in shorts:
        engine.arrive((other + 1.0, 0.01))
    assert engine.step() == [short]


@given(lines(), st.integers(1, 12), st.floats(0.1, 100.0))
def test_a_wait_counts_what_goes_before_and_what_holds_the_memory(
    jobs: list[Job], memory_bytes: int, remaining_s: float
) -> None:
    new = Job(place=99, remaining_s=remaining_s)
    able = [job for job in jobs if job.has_reader and job.has_room and not job.is_computed]
    shorter = [job for job in able if job.remaining_s <= remaining_s]
    wait = wait_of(new, [*jobs, new], memory_bytes=memory_bytes)
    assert wait.num_ahead == sum(not job.is_started for job in shorter)
    assert wait.estimated_s >= sum(job.remaining_s for job in shorter) * (1 - 1e-9)
    if sum(job.memory_bytes for job in jobs if job.is_started) < memory_bytes:
        assert wait.estimated_s == pytest.approx(sum(job.remaining_s for job in shorter))


def test_a_short_job_waits_for_memory_that_a_longer_one_holds() -> None:
    longs = [Job(place=0, remaining_s=30.0, memory_bytes=2, is_started=True)]
    longs.append(Job(place=1, remaining_s=20.0, memory_bytes=2, is_started=True))
    assert wait_of(Job(place=2, remaining_s=1.0), longs, memory_bytes=4) == Wait(num_ahead=0, estimated_s=20.0)
    assert wait_of(Job(place=2, remaining_s=1.0), longs, memory_bytes=5) == Wait(num_ahead=0, estimated_s=0.0)
