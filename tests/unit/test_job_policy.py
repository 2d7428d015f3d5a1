"""Whose step is next: by place in line among those who can use the engine, and never too many begun."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_node.job_policy import job_in_the_way, next_job

NOW_S = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    place: int
    is_started: bool = False
    is_computed: bool = False
    has_reader: bool = True
    has_room: bool = True


@st.composite
def lines(draw: st.DrawFn) -> list[Job]:
    places = draw(st.lists(st.integers(0, 20), unique=True, max_size=6))
    flags = {name: st.booleans() for name in ("is_started", "is_computed", "has_reader", "has_room")}
    jobs = [draw(st.builds(Job, place=st.just(place), **flags)) for place in places]
    return [replace(job, is_started=True) if job.is_computed else job for job in jobs]


def test_the_first_in_line_goes_on_before_a_later_one_that_has_begun() -> None:
    first, second = Job(place=1, is_started=True), Job(place=2, is_started=True)
    assert next_job([second, first], NOW_S, max_started=2) is first


@pytest.mark.parametrize("trouble", [{"has_room": False}, {"has_reader": False}, {"is_computed": True}])
def test_the_next_one_begins_where_the_first_has_no_use_for_the_engine(trouble: dict[str, bool]) -> None:
    first, second = Job(place=1, is_started=True, **trouble), Job(place=2)
    assert next_job([first, second], NOW_S, max_started=2) is second


def test_nobody_begins_where_too_many_have() -> None:
    first, second = Job(place=1, is_started=True, has_room=False), Job(place=2)
    assert next_job([first, second], NOW_S, max_started=1) is None


@given(lines(), st.integers(1, 4))
def test_the_choice_can_use_the_engine_and_nobody_before_it_can(jobs: list[Job], max_started: int) -> None:
    may_start = sum(job.is_started for job in jobs) < max_started
    able = [job for job in jobs if job.has_reader and job.has_room and not job.is_computed]
    able = [job for job in able if job.is_started or may_start]
    assert next_job(jobs, NOW_S, max_started=max_started) is min(able, key=lambda job: job.place, default=None)


@given(lines(), st.integers(1, 4))
def test_a_job_in_the_way_has_no_reader_and_its_end_lets_another_one_begin(jobs: list[Job], max_started: int) -> None:
    jobs = [job if job.is_started else replace(job, has_room=True) for job in jobs]
    if next_job(jobs, NOW_S, max_started=max_started) is not None:
        return
    if (idle := job_in_the_way(jobs, max_started=max_started)) is not None:
        assert idle.is_started
        assert not idle.has_reader
        if sum(job.is_started for job in jobs) == max_started:
            rest = [job for job in jobs if job is not idle]
            assert next_job(rest, NOW_S, max_started=max_started) is not None


def test_a_job_without_a_reader_is_in_nobodys_way_while_nobody_waits() -> None:
    assert job_in_the_way([Job(place=1, is_started=True, has_reader=False)], max_started=1) is None


def test_a_job_with_a_reader_is_never_in_the_way() -> None:
    slow = Job(place=1, is_started=True, has_room=False)
    assert job_in_the_way([slow, Job(place=2)], max_started=1) is None
