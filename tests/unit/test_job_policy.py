"""Whose steps are next: the shortest remaining work, a share for the first in line, and never too much memory."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_node.job_policy import FIRST_SHARE, Wait, charge, job_in_the_way, next_job, wait_of

ENOUGH = 1000


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    place: int
    remaining_s: float = 10.0
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


def test_a_job_without_a_reader_is_in_nobodys_way_while_nobody_waits() -> None:
    assert job_in_the_way([Job(place=1, is_started=True, has_reader=False)]) is None


def test_a_job_with_a_reader_is_never_in_the_way() -> None:
    slow = Job(place=1, is_started=True, has_room=False)
    assert job_in_the_way([slow, Job(place=2)]) is None


# How a simulated engine is used: each entry is one of its steps, with the works that arrive while it is made.
STEP_S = st.floats(0.01, 1.0)
ARRIVALS = st.lists(st.lists(st.tuples(st.floats(0.01, 20.0), STEP_S), max_size=2), max_size=150)


class Engine:
    """Makes steps as the policy says; every job has steps of a length of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.jobs: list[Job] = []
        self.step_of: dict[Job, float] = {}
        self.ends_by_s: dict[Job, float] = {}

    def arrive(self, remaining_s: float, step_s: float) -> None:
        job = Job(place=len(self.step_of), remaining_s=remaining_s)
        before = [*self.jobs, job]
        self.step_of[job] = step_s
        # The longest step that anybody may make, for each of those before it and for itself.
        promised_s = sum(each.remaining_s for each in before) / FIRST_SHARE + len(before) * 1.0
        self.ends_by_s[job] = self.now_s + promised_s
        self.jobs.append(job)

    def step(self) -> Job | None:
        chosen = next_job(self.jobs, memory_bytes=ENOUGH)
        if chosen is None:
            return None
        step_s = min(self.step_of[chosen], chosen.remaining_s)
        charge(self.jobs, chosen, step_s)
        self.now_s += step_s
        chosen.remaining_s -= step_s
        chosen.is_started, chosen.is_computed = True, chosen.remaining_s <= 1e-9
        if chosen.is_computed:
            self.jobs.remove(chosen)
            assert self.now_s <= self.ends_by_s[chosen] + 1e-6
        return chosen


@given(ARRIVALS)
def test_every_job_has_ended_in_time_whatever_arrives(arrivals: list[list[tuple[float, float]]]) -> None:
    engine = Engine()
    for works in arrivals:
        for remaining_s, step_s in works:
            engine.arrive(remaining_s, step_s)
        engine.step()
    while engine.step() is not None:
        pass
    assert not engine.jobs


def test_a_long_job_ends_in_time_under_a_flood_of_short_ones() -> None:
    engine = Engine()
    engine.arrive(20.0, 1.0)
    (long,) = engine.jobs
    for _ in range(10_000):
        engine.arrive(0.1, 0.1)
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
    engine.arrive(50.0, step_s)
    for _ in range(1 + num_steps):
        engine.step()
    engine.arrive(min(shorts), 0.01)
    short = engine.jobs[-1]
    for other in shorts:
        engine.arrive(other + 1.0, 0.01)
    assert engine.step() is short


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
