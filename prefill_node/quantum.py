"""How many steps the engine makes before the policy is asked again."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefill_node.cost_model import CostModel, Work
from prefill_node.prefill_job import PrefillJob


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantum:
    """Steps that the engine makes before anybody is asked again, of one job or of several as one."""

    num_steps: int
    steps_s: float
    own_s: dict[PrefillJob, float]
    """What each job's own steps would take alone."""


def steps_within(jobs: Sequence[PrefillJob], costs: CostModel, quantum_s: float) -> Quantum:
    """As many steps of jobs as fit into a time, and at least one; of several jobs, each step of all as one."""
    num_steps, steps_s, own_s = 0, 0.0, dict.fromkeys(jobs, 0.0)
    for works in zip(*(job.works_ahead() for job in jobs), strict=True):
        step_s = costs.seconds(Work.shared(works))
        if num_steps and steps_s + step_s > quantum_s:
            break
        num_steps, steps_s = num_steps + 1, steps_s + step_s
        for job, work in zip(jobs, works, strict=True):
            own_s[job] += costs.seconds(work)
    return Quantum(num_steps=num_steps, steps_s=steps_s, own_s=own_s)
