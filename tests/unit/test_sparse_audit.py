"""The audit of sparse attention: its bound holds as often as it says, its price is kept, bad lists are found.

Shapes: N tokens, R sampled rows, H query heads, K kv heads.
"""

import math

import pytest
import torch
from colm_kernels.steps import all_at_once
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefill_node.sparse.audit import Audit, audit, lower_bound
from prefill_node.sparse.patterns import AShape, BlockSparse, PatternFile
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.planner import ESTIMATION_ROWS, SparsePlanner
from prefill_node.sparse.policy import MAX_COST, ROW_BLOCK, AuditPolicy, SparsePolicy
from tests.kernel_inputs import prefill_inputs
from tests.tiny import tiny_config

NUM_TOKENS, DIM = 2048, 64
CONFIG = tiny_config(chains=(4, 2))
NUM_TRIALS = 4000


def draw(kind: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, float]:
    """Values from 0 to 1, independent of one another, and their mean."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    match kind:
        case "uniform":
            return uniform, 0.5
        case "near one":  # 1 - u^20 / 5
            return 1 - uniform**20 / 5, 1 - 1 / 105
        case "rarely nothing":
            return (uniform > 0.02).double(), 0.98
        case "constant":
            return torch.full(shape, 0.9, dtype=torch.float64), 0.9
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["uniform", "near one", "rarely nothing", "constant"])
@pytest.mark.parametrize("num_rows", [2, 50, 400])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_bound_holds_as_often_as_it_says(kind, num_rows, confidence):
    generator = torch.Generator().manual_seed(num_rows)
    values_RX, mean = draw(kind, (num_rows, NUM_TRIALS), generator)
    missed = float((lower_bound(values_RX, confidence) > mean).double().mean())
    # Six standard deviations of the share of trials that miss when each does with the probability allowed.
    allowed = 1 - confidence
    assert missed <= allowed + 6 * math.sqrt(allowed * (1 - allowed) / NUM_TRIALS)


def test_a_bound_that_left_out_the_variance_would_not_hold():
    """Without that term the means of wide samples are missed more often than allowed: coverage is worth testing."""
    values_RX, mean = draw("uniform", (400, NUM_TRIALS), torch.Generator().manual_seed(1))
    log, variance_X = math.log(2 / 0.1), values_RX.var(dim=0)
    careless_X = lower_bound(values_RX, 0.9) + (2 * variance_X * log / 400).sqrt()
    assert float((careless_X > mean).double().mean()) > 0.1


def test_the_bound_is_that_of_maurer_and_pontil():
    values_R1 = torch.tensor([[0.0], [1.0], [1.0], [1.0]] * 100)
    log, variance = math.log(2 / 0.05), 0.75 * 0.25 * 400 / 399
    expected = 0.75 - math.sqrt(2 * variance * log / 400) - 7 * log / (3 * 399)
    assert float(lower_bound(values_R1, 0.95)) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50), st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_the_bound_is_no_mean_and_falls_with_the_confidence(values, confidence, more):
    values_R1 = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    low, lower = (float(lower_bound(values_R1, of)) for of in (confidence, confidence + more))
    assert 0.0 <= lower <= low <= float(values_R1.mean())


def sharp_prompt() -> tuple[Tensor, Tensor]:
    """q_NHE, k_KNE: head 2 looks at key 300 from everywhere, the others at what is near."""
    q, k, _ = prefill_inputs(NUM_TOKENS, NUM_TOKENS, 4, 2, 16, torch.float32)
    q, k = 0.01 * q, 0.01 * k
    q[:, 2, 0], k[1, 300, 0] = 8.0, 8.0
    turn_N = torch.arange(NUM_TOKENS) / 40
    for head in (0, 1, 3):
        q[:, head, 2], q[:, head, 3] = 20 * turn_N.cos(), 20 * turn_N.sin()
    k[:, :, 2], k[:, :, 3] = 20 * turn_N.cos(), 20 * turn_N.sin()
    q[:, 3], k[1, :, 2:4] = q[:, 2], 0.0
    return q, k


def planned(q: Tensor, k: Tensor, patterns: PatternFile | None = None, **options) -> LayerPlan:
    policy = SparsePolicy(dense_below_tokens=0, **({"last_rows_dense": 0} | options))
    plan = all_at_once(SparsePlanner(CONFIG, policy, patterns).plan(0, q[-ESTIMATION_ROWS:], k))
    assert plan is not None
    return plan


def audited(plan: LayerPlan, q: Tensor, k: Tensor, seed: int = 0, **options) -> Audit | None:
    policy, generator = AuditPolicy(**options), torch.Generator().manual_seed(seed)
    return all_at_once(audit(plan, lambda position_X: q[position_X], k, dim=DIM, policy=policy, generator=generator))


def local_only() -> PatternFile:
    return PatternFile(((AShape(sink_tokens=1, local_tokens=128),) * 4,) * 2)


def test_a_list_that_misses_its_needle_is_found_and_made_dense():
    q, k = sharp_prompt()
    plan = planned(q, k, local_only())
    found = audited(plan, q, k, max_cost=0.049, max_rows=2000, floor=0.3)
    assert found is not None
    assert 1 in found.below_floor
    assert float(found.recall_H[2]) < 0.3
    repaired = plan.with_dense(found.below_floor)
    again = audited(repaired, q, k, max_cost=0.049, max_rows=2000, floor=0.3)
    assert again is not None
    assert again.recall_H[2:].tolist() == [1.0, 1.0]
    assert 1 not in again.below_floor


def test_an_audit_looks_at_the_layer_as_a_whole_too():
    q, k = sharp_prompt()
    found = audited(planned(q, k, mass=0.9), q, k, max_cost=0.049)
    assert found is not None
    assert found.recall == pytest.approx(float(found.recall_H.mean()))
    assert (found.recall_bound_H <= found.recall_H).all()
    assert 0 < found.recall_bound < found.recall


def test_equal_seeds_look_at_equal_rows():
    q, k = sharp_prompt()
    plan = planned(q, k, mass=0.9)
    first, same, other = (audited(plan, q, k, seed, max_cost=0.04) for seed in (1, 1, 2))
    assert first is not None
    assert same is not None
    assert other is not None
    assert torch.equal(first.recall_H, same.recall_H)
    assert not torch.equal(first.recall_H, other.recall_H)


BLOCKS = PatternFile(((BlockSparse(num_blocks=2),) * 4,) * 2)


@pytest.mark.parametrize("patterns", [None, BLOCKS], ids=["columns", "blocks chosen by queries"])
@pytest.mark.parametrize("max_cost", [0.01, 0.04, 0.0499])
def test_the_price_is_computed_and_kept(patterns, max_cost):
    """Counted in products of one query with one key, for each call that is made."""
    q, k = sharp_prompt()
    plan = planned(q, k, patterns, mass=0.9)
    rows = []

    def queries_of(position_X: Tensor) -> Tensor:
        rows.append(position_X)
        return q[position_X]

    generator = torch.Generator().manual_seed(3)
    policy = AuditPolicy(max_cost=max_cost, max_rows=10_000)
    found = all_at_once(audit(plan, queries_of, k, dim=1, policy=policy, generator=generator))
    assert found is not None
    projected = sum(map(len, rows))
    assert projected == found.num_rows * (1 if patterns is None else 1 + ROW_BLOCK)
    scored = int((rows[-1] + 1).sum())
    attention = plan.density() * NUM_TOKENS * (NUM_TOKENS + 1) / 2 * 2
    assert found.cost == pytest.approx((scored + projected) / attention)
    assert found.cost <= max_cost < MAX_COST


def test_a_prompt_too_short_for_the_price_is_not_audited():
    q, k = sharp_prompt()
    assert audited(planned(q[:256], k[:, :256], mass=0.5), q, k, max_cost=0.001) is None


def test_no_more_rows_are_looked_at_than_asked_for():
    q, k = sharp_prompt()
    found = audited(planned(q, k, mass=0.9), q, k, max_cost=0.049, max_rows=7)
    assert found is not None
    assert found.num_rows == 7


def test_a_floor_of_nothing_only_reports():
    q, k = sharp_prompt()
    found = audited(planned(q, k, local_only()), q, k, max_cost=0.049, floor=0.0)
    assert found is not None
    assert float(found.recall_H[2]) < 0.3
    assert found.below_floor == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": -0.1}, "floor=-0.1 must be at least 0 and below 1"),
        ({"floor": 1.0}, "floor=1.0 must be"),
        ({"confidence": float("nan")}, "confidence=nan must be"),
        ({"max_rows": 1}, "max_rows=1 must be at least 2"),
        ({"max_cost": 0.05}, "max_cost=0.05 must be above 0 and below 0.05"),
        ({"max_cost": 0.0}, "max_cost=0.0 must be"),
    ],
)
def test_a_policy_names_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AuditPolicy(**options)
