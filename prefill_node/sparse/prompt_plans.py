"""One prompt's sparse attention: each layer planned, audited, and where it missed too much made dense again.

Shapes: X rows, N tokens of the prompt, H query heads, K kv heads, E head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from colm_kernels.sparse_estimate import SCORES_AT_ONCE
from colm_kernels.steps import Steps
from torch import Tensor

from colm.events import LayerRecall, SparseReport
from prefill_node.sparse.audit import audit
from prefill_node.sparse.lines import NUM_PASSES
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.planner import ESTIMATION_ROWS, SparsePlanner
from prefill_node.sparse.policy import AuditPolicy


@dataclass(frozen=True, slots=True)
class _Planned:
    """What came of a layer's plan."""

    density: float
    num_steps: int


class PromptPlans:
    """Plans one prompt, and remembers what its audits said.

    Args:
        planner: of the model.
        audit_policy: what a plan must recall.
    """

    def __init__(self, planner: SparsePlanner, audit_policy: AuditPolicy | None = None) -> None:
        self._planner = planner
        self._audit_policy = audit_policy or AuditPolicy()
        # The same for every prompt, so that a node that computes one again looks at the same rows and decides alike.
        self._generator = torch.Generator().manual_seed(0)
        self._audited: dict[int, LayerRecall] = {}
        self._planned: dict[int, _Planned] = {}

    def covers(self, layer: int, num_tokens: int) -> bool:
        """Whether a layer may be sparse, of a prompt of that length."""
        return not self._planner.policy.is_dense(layer, num_tokens)

    def covers_any(self, num_tokens: int) -> bool:
        """Whether any layer may be sparse, of a prompt of that length."""
        return any(self.covers(layer, num_tokens) for layer in range(self._planner.config.num_layers - 1))

    def density(self, layer: int, num_tokens: int) -> float:
        """Share of the causal pairs that a planned layer attends to; before, as others of the prompt, or expected."""
        if layer in self._planned:
            return self._planned[layer].density
        known = [planned.density for planned in self._planned.values()]
        return mean(known) if known else self._planner.policy.expected_density(num_tokens)

    def num_plan_steps(self, layer: int, num_tokens: int) -> int:
        """Pauses of a layer's plan; before, as those of another, or expected."""
        known = self._planned.get(layer) or next(iter(self._planned.values()), None)
        return -(-self.plan_scores(num_tokens) // SCORES_AT_ONCE) if known is None else known.num_steps

    def plan_scores(self, num_tokens: int) -> int:
        """Products of a query and a key that a layer's plan and audit make."""
        config, policy = self._planner.config, self._planner.policy
        density = policy.expected_density(num_tokens)
        num_rows = self._audit_policy.num_rows(density, num_tokens, config.chain_dims[0])
        return config.chains[0] * num_tokens * (NUM_PASSES * ESTIMATION_ROWS + num_rows // 2)

    def memory_bytes(self, num_tokens: int, tile_tokens: int) -> int:
        """Predicted peak of planning, auditing and an index, beside what a dense run takes."""
        return self._planner.memory_bytes(num_tokens, tile_tokens, audited_rows=self._audit_policy.max_rows)

    def plan(self, layer: int, queries_of: Callable[[Tensor], Tensor], k_KNE: Tensor) -> Steps[LayerPlan | None]:
        """What a layer attends to; heads that the audit finds below its floor attend to everything.

        Args:
            layer: its number; each is planned once, in order.
            queries_of: rotated queries q_XHE of int64 positions, in any order and more than once.
            k_KNE: rotated keys of the whole prompt.

        Returns:
            The plan; None where the layer had better be dense.
        """
        num_steps, planning = 0, self._plan(layer, queries_of, k_KNE)
        while True:
            try:
                next(planning)
            except StopIteration as end:
                plan: LayerPlan | None = end.value
                density = 1.0 if plan is None else plan.density()
                self._planned[layer] = _Planned(density, num_steps)
                return plan
            num_steps += 1
            yield

    def _plan(self, layer: int, queries_of: Callable[[Tensor], Tensor], k_KNE: Tensor) -> Steps[LayerPlan | None]:
        num_tokens = k_KNE.shape[1]
        q_RHE = queries_of(torch.arange(max(0, num_tokens - ESTIMATION_ROWS), num_tokens))
        yield
        plan = yield from self._planner.plan(layer, q_RHE, k_KNE)
        if plan is None or self._is_too_dense(plan):
            return None
        found = yield from audit(
            plan,
            queries_of,
            k_KNE,
            dim=self._planner.config.chain_dims[0],
            policy=self._audit_policy,
            generator=self._generator,
        )
        if found is None:
            return None
        plan = plan.with_dense(found.below_floor)
        if self._is_too_dense(plan):
            return None
        num_dense = sum(of_list.is_dense for of_list in plan.lists) * q_RHE.shape[1] // len(plan.lists)
        self._audited[layer] = LayerRecall(
            layer=layer,
            num_rows=found.num_rows,
            recall=found.recall,
            recall_bound=found.recall_bound,
            num_dense_heads=num_dense,
        )
        return plan

    def report(self) -> SparseReport:
        """What became of every layer that attends; one without an audit was dense."""
        config = self._planner.config
        layers = range(config.num_layers - 1)
        return SparseReport(
            layers=tuple(
                self._audited.get(layer) or LayerRecall.of_dense(layer, num_heads=config.chains[0]) for layer in layers
            )
        )

    def _is_too_dense(self, plan: LayerPlan) -> bool:
        return plan.density() > self._planner.policy.max_density
