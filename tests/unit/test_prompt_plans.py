"""One prompt's plans: what they are made of, what the audit makes dense, what is reported.

Shapes: N tokens of the prompt, X rows.
"""

import pytest
import torch
from colm_kernels.steps import all_at_once
from torch import Tensor

from colm.events import LayerRecall
from prefill_node.sparse.patterns import AShape, PatternFile
from prefill_node.sparse.planner import ESTIMATION_ROWS, SparsePlanner
from prefill_node.sparse.policy import AuditPolicy, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.kernel_inputs import prefill_inputs
from tests.tiny import tiny_config

NUM_TOKENS = 2048
CONFIG = tiny_config(chains=(4, 2), num_layers=3)
LOCAL = PatternFile(((AShape(sink_tokens=1, local_tokens=128),) * 4,) * 3)


def sharp_prompt() -> tuple[Tensor, Tensor]:
    """q_NHE, k_KNE: head 2 looks at key 300 from everywhere, the others at what is near."""
    q, k, _ = prefill_inputs(NUM_TOKENS, NUM_TOKENS, 4, 2, 16, torch.float32)
    q, k = 0.01 * q, 0.01 * k
    q[:, 2, 0], k[1, 300, 0] = 8.0, 8.0
    turn_N = torch.arange(NUM_TOKENS) / 400
    for x in (*(k[i] for i in range(2)), *(q[:, head] for head in (0, 1, 3))):
        x[:, 2], x[:, 3] = 20 * turn_N.cos(), 20 * turn_N.sin()
    return q, k


def plans_of(audit_policy: AuditPolicy, patterns: PatternFile | None = LOCAL, **policy: object) -> PromptPlans:
    chosen = SparsePolicy(**({"dense_below_tokens": 0, "last_rows_dense": 0} | policy))  # type: ignore[arg-type]
    return PromptPlans(SparsePlanner(CONFIG, chosen, patterns), audit_policy)


def test_heads_that_recall_too_little_attend_to_everything_and_are_counted() -> None:
    q, k = sharp_prompt()
    plans = plans_of(AuditPolicy(max_cost=0.049, max_rows=2000, floor=0.3))
    plan = all_at_once(plans.plan(1, lambda position_X: q[position_X], k))
    assert plan is not None
    assert [of_list.is_dense for of_list in plan.lists] == [False, True]
    without, found = plans.report().layers
    assert (found.layer, found.num_dense_heads) == (1, 2)  # head 3 shares the list of head 2
    assert 0 < found.recall_bound < found.recall < 0.9
    assert without == LayerRecall.of_dense(0, num_heads=4)


def test_a_plan_is_made_of_the_last_rows() -> None:
    q, k = sharp_prompt()
    asked = []

    def queries_of(position_X: Tensor) -> Tensor:
        asked.append(position_X)
        return q[position_X]

    plans = plans_of(AuditPolicy(max_cost=0.049, floor=0.1), None, mass=0.9)
    plan = all_at_once(plans.plan(0, queries_of, k))
    assert asked[0].tolist() == list(range(NUM_TOKENS - ESTIMATION_ROWS, NUM_TOKENS))
    assert plan is not None
    assert 300 in plan.lists[1].verticals().tolist()


@pytest.mark.parametrize(("options", "covers"), [({}, True), ({"dense_layers": (1,)}, False)])
def test_which_layers_are_planned_is_the_policys_choice(options: dict[str, object], covers: bool) -> None:
    assert plans_of(AuditPolicy(), **options).covers(1, NUM_TOKENS) == covers
    assert not plans_of(AuditPolicy(), dense_below_tokens=NUM_TOKENS + 1).covers(1, NUM_TOKENS)
