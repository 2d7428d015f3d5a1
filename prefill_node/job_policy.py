"""Whose step is next, who shares it, and how long the others wait. No tensors, no I/O: a job is what it says itself."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

FIRST_SHARE = 0.25
"""Of the engine's time, for the first in line."""

SLOWDOWN = 2.0
"""What is left of a prompt takes at most so many times as long where others share its steps."""


class Candidate(Protocol):
    """A job, as far as its turn depends on it."""

    owed_s: float
    """Engine time that the job has not had while it was the first in line; written by `charge` alone."""

    @property
    def place(self) -> int:
        """Its place in line; lower ones came before."""

    @property
    def remaining_s(self) -> float:
        """Engine time that its steps will still take; 0 where none is left."""

    @property
    def shared_s(self) -> float:
        """Of `remaining_s`, what its steps would not take if they were made as one with another job's."""

    @property
    def layer(self) -> int:
        """Of its next step."""

    @property
    def tile_rows(self) -> int | None:
        """Its rows, where its whole prompt is one tile and its steps may be shared; None where they may not."""

    @property
    def memory_bytes(self) -> int:
        """What it holds, or will hold once it has begun."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """What lies before a job that has not begun."""

    num_ahead: int
    """Jobs that will begin before it."""
    estimated_s: float
    """Engine time of what goes before it, jobs that have begun among them."""


def next_job(jobs: Collection[_Job], *, memory_bytes: int) -> _Job | None:
    """The job whose steps the engine makes next; None where no job can make use of it.

    The shortest remaining work goes first. But the first in line, of those that can use the engine, gets a quarter of
    its time, and where it is owed some and waits for memory, no later one takes what becomes free. `companions` share
    the job's steps. Hence, whatever arrives and with memory for all:

    - A job of R seconds that finds jobs of W seconds in line has ended after 4 (W + R) seconds of engine time, and the
      longest step, shared or not, once for itself and for each of those jobs.
    - A job that is shorter than all others begins after the step that is being made and what the first in line is
      owed, which are at most two of the longest steps.

    Args:
        jobs: all that there are.
        memory_bytes: what those that have begun may hold together.
    """
    able = _able(jobs)
    if not able:
        return None
    free_bytes = memory_bytes - sum(job.memory_bytes for job in jobs if job.is_started)
    claims = [job for job in jobs if needs_memory_alone(job)]

    def fits(job: _Job) -> bool:
        claimed_bytes = sum(each.memory_bytes for each in claims if each.place < job.place)
        return job.is_started or job.memory_bytes <= free_bytes - claimed_bytes

    fitting = [job for job in able if fits(job)]
    first = min(able, key=_place)
    if first.owed_s > 0:
        if first in fitting:
            return first
        # Not even where the engine idles: short jobs that begin in each gap would keep a large one out for ever.
        fitting = [job for job in fitting if job.is_started]
    return min(fitting, key=_shortest, default=None)


def companions(chosen: _Job, jobs: Iterable[_Job], *, memory_bytes: int, tile_tokens: int) -> list[_Job]:
    """The jobs whose next steps are made as one with those of the chosen job.

    They stand at the same layer, have memory to begin, and together are at most one tile. They come in the order in
    which they would be chosen. Nobody is waited for. A step has a price of its own, which is paid once for all; so they
    join as long as what they add keeps within `SLOWDOWN`.

    Args:
        chosen: of `next_job`.
        jobs: all that there are.
        memory_bytes: as for `next_job`.
        tile_tokens: rows of one step.
    """
    if chosen.tile_rows is None:
        return []
    able = _able(jobs)
    first = min(able, key=_place)
    may_join = first is chosen or first.owed_s <= 0
    free_bytes = memory_bytes - sum(job.memory_bytes for job in {*jobs, chosen} if job.is_started or job is chosen)
    num_rows, spare_s = tile_tokens - chosen.tile_rows, (SLOWDOWN - 1) * chosen.remaining_s
    joined = []
    for job in sorted(able, key=_shortest):
        if job is chosen or job.tile_rows is None or job.layer != chosen.layer:
            continue
        new_bytes, added_s = 0 if job.is_started else job.memory_bytes, job.remaining_s - job.shared_s
        has_memory = job.is_started or (may_join and new_bytes <= free_bytes)
        if has_memory and job.tile_rows <= num_rows and added_s <= spare_s:
            joined.append(job)
            num_rows, spare_s, free_bytes = num_rows - job.tile_rows, spare_s - added_s, free_bytes - new_bytes
    return joined


def needs_memory_alone(job: Candidate) -> bool:
    """All of it is kept, so that it has no turn to wait for."""
    return job.is_computed and not job.is_started and job.has_reader


def may_begin(job: _Job, jobs: Collection[_Job], *, memory_bytes: int) -> bool:
    """Whether there is memory for a job that needs no engine, beside what the first in line is owed.

    Args:
        job: one that `needs_memory_alone`.
        jobs: all that there are.
        memory_bytes: as for `next_job`.
    """
    taken = [each.memory_bytes for each in jobs if each.is_started]
    first = min((each for each in _able(jobs) if not each.is_started), key=_place, default=None)
    if first is not None and first.owed_s > 0 and first.place < job.place:
        taken.append(first.memory_bytes)
    return job.memory_bytes <= memory_bytes - sum(taken)


def charge(jobs: Iterable[_Job], own_s: Mapping[_Job, float], steps_s: float) -> None:
    """Note what the engine will work for; before it does.

    Args:
        jobs: all that there are.
        own_s: for each job whose steps are made as one, what its own would take alone.
        steps_s: what they take together.
    """
    first = min(_able(jobs), key=_place)
    if first in own_s:
        # What it gets beyond its share, because it is the shortest as well, is no debt: only the last step counts.
        first.owed_s = max(first.owed_s, 0.0) + FIRST_SHARE * steps_s - own_s[first]
    else:
        first.owed_s += FIRST_SHARE * steps_s


def job_in_the_way(jobs: Iterable[_Job]) -> _Job | None:
    """The job to give up where the engine idles for its sake; to be asked when `next_job` has found none.

    It has begun, nobody reads it, and somebody who could begin waits for its memory. Of several, the last in line.
    """
    in_line = sorted(jobs, key=_place)
    if not any(job.has_reader and not job.is_started for job in in_line):
        return None
    return next((job for job in reversed(in_line) if job.is_started and not job.has_reader), None)


def wait_of(job: Candidate, others: Iterable[Candidate], *, memory_bytes: int) -> Wait:
    """What goes before a job that has not begun: shorter ones, and longer ones that hold the memory that it needs."""
    able = [other for other in _able(others) if other is not job]
    before = [other for other in able if _shortest(other) < _shortest(job)]
    held = sorted((other for other in others if other.is_started), key=_shortest)
    free_bytes = memory_bytes - sum(other.memory_bytes for other in held)
    for other in held:
        if job.memory_bytes <= free_bytes:
            break
        free_bytes += other.memory_bytes
        if other not in before:
            before.append(other)
    return Wait(
        num_ahead=sum(not other.is_started for other in before),
        estimated_s=sum(other.remaining_s for other in before),
    )


def _able(jobs: Iterable[_Job]) -> list[_Job]:
    """Those that can use the engine, were there memory for all."""
    return [job for job in jobs if not job.is_computed and job.has_reader and job.has_room]


def _place(job: Candidate) -> int:
    return job.place


def _shortest(job: Candidate) -> tuple[float, int]:
    return job.remaining_s, job.place
