"""What the engine makes before the policy is asked again, and how many steps that are."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from prefill_node.cost_model import CostModel, Work
from prefill_node.job_policy import Candidate, charge, companions, next_job

QUANTUM_S = 0.010
"""Work for which the policy is not asked again: of a short prompt, several steps. A step is never divided."""


class Steppable(Candidate, Protocol):
    """A job whose steps can be counted."""

    def works_ahead(self) -> Iterator[Work]:
        """What each step takes that is still to be made."""


_Job = TypeVar("_Job", bound=Steppable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantum(Generic[_Job]):
    """Steps that the engine makes before anybody is asked again, of one job or of several as one."""

    num_steps: int
    steps_s: float
    own_s: dict[_Job, float]
    """What each job's own steps would take alone; the chosen job is the first."""


def next_quantum(jobs: Collection[_Job], costs: CostModel, *, memory_bytes: int) -> Quantum[_Job] | None:
    """Choose the next job and those that share its steps, and charge them; None where no job can use the engine.

    Args:
        jobs: all that there are.
        costs: of the engine.
        memory_bytes: what those that have begun may hold together.
    """
    if (job := next_job(jobs, memory_bytes=memory_bytes)) is None:
        return None
    sharing = companions(job, jobs, memory_bytes=memory_bytes, tile_tokens=costs.shape.tile_tokens)
    quantum = steps_within([job, *sharing], costs, QUANTUM_S)
    charge(jobs, quantum.own_s, quantum.steps_s)
    return quantum


def steps_within(jobs: Sequence[_Job], costs: CostModel, quantum_s: float) -> Quantum[_Job]:
    """As many steps of jobs as fit into a time, and at least one; of several jobs, each step of all as one."""
    num_steps, steps_s, alone_sums_s = 0, 0.0, [0.0] * len(jobs)
    seen: tuple[Work, ...] = ()
    step_s, alone_s = 0.0, list[float]()
    for works in zip(*(job.works_ahead() for job in jobs), strict=True):
        if works != seen:  # those of a prompt of one tile are alike, layer after layer
            seen, step_s = works, costs.seconds(Work.shared(works))
            alone_s = [costs.seconds(work) for work in works] if len(jobs) > 1 else []
        if num_steps and steps_s + step_s > quantum_s:
            break
        num_steps, steps_s = num_steps + 1, steps_s + step_s
        if alone_s:
            alone_sums_s = [total + own for total, own in zip(alone_sums_s, alone_s, strict=True)]
    own_s = dict(zip(jobs, alone_sums_s if len(jobs) > 1 else [steps_s], strict=True))
    return Quantum(num_steps=num_steps, steps_s=steps_s, own_s=own_s)
