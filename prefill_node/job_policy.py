"""Whose step is next. No tensors, no I/O: a job is what it says about itself."""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """A job, as far as its turn depends on it."""

    @property
    def place(self) -> int:
        """Its place in line; lower ones came before."""

    @property
    def is_started(self) -> bool:
        """It holds an engine's memory, or tiles that nobody has stored yet."""

    @property
    def is_computed(self) -> bool:
        """It has no step left."""

    @property
    def has_reader(self) -> bool:
        """A stream is attached."""

    @property
    def has_room(self) -> bool:
        """Its window takes another tile."""


_Job = TypeVar("_Job", bound=Candidate)


def next_job(
    jobs: Iterable[_Job],
    now_s: float,  # noqa: ARG001 - for policies under which jobs take turns
    *,
    max_started: int,
) -> _Job | None:
    """The job whose next step, one tile of one layer, the engine runs; None where no job can make use of it.

    First come, first served: a job runs to its end, unless its window is full or nobody reads it. Then the next one
    may use the engine, as long as at most `max_started` have begun.
    """
    in_line = sorted(jobs, key=lambda job: job.place)
    may_start = sum(job.is_started for job in in_line) < max_started
    for job in in_line:
        if not job.is_computed and job.has_reader and job.has_room and (job.is_started or may_start):
            return job
    return None


def job_in_the_way(jobs: Iterable[_Job], *, max_started: int) -> _Job | None:
    """The job to give up where the engine idles for its sake; to be asked when `next_job` has found none.

    It has begun, nobody reads it, and somebody who could begin waits for its place. Of several, the last in line.
    """
    in_line = sorted(jobs, key=lambda job: job.place)
    started = [job for job in in_line if job.is_started]
    if len(started) < max_started or not any(job.has_reader and not job.is_started for job in in_line):
        return None
    return next((job for job in reversed(started) if not job.has_reader), None)
