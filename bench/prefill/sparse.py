"""Sparse attention of the tables' sparse rows: the node's own planner, with a budget of keys for each row.

A share of the attention, which is a node's default, would list nearly all of it: random weights attend evenly. For the
same reason the audit reports alone.
"""

from dataclasses import dataclass, field, replace
from typing import Final

from bench.prefill.record import Sparse
from bench.roofline.machine import Machine
from bench.roofline.model import Prompt
from colm.model.config import ChainConfig
from colm.model.transformer import slice_config
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import ROW_BLOCK, AuditPolicy, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans

KEYS_PER_ROW: Final = 4096
PLAN_SHARE: Final = 0.25
"""Of attention's rate, that a plan's products reach; for predictions alone."""
AUDIT: Final = AuditPolicy(floor=0.0)


@dataclass(frozen=True)
class Budget:
    """What a row of queries is given.

    Raises:
        ValueError: fewer keys than every row has anyway.
    """

    keys_per_row: int = KEYS_PER_ROW
    policy: SparsePolicy = field(init=False)

    def __post_init__(self) -> None:
        policy = SparsePolicy(mass=None, keys_per_row=self.keys_per_row, dense_below_tokens=0)
        object.__setattr__(self, "policy", policy)

    def plans(self, config: ChainConfig) -> PromptPlans:
        """What plans one prompt."""
        return PromptPlans(SparsePlanner(config, self.policy), AUDIT)

    def record(self) -> Sparse:
        """As a record states it."""
        return Sparse(keys_per_row=self.keys_per_row, audit_floor=AUDIT.floor)

    def tile_tokens(self, tile_tokens: int) -> int:
        """The engine's tiles: whole row blocks."""
        return max(1, tile_tokens // ROW_BLOCK) * ROW_BLOCK


def sparse_s(machine: Machine, prompt: Prompt, budget: Budget) -> tuple[float, float]:
    """Seconds of a sparse prefill on a machine, and of the plan of one layer among them."""
    config, chain1 = prompt.config, slice_config(prompt.config, 1)
    plan_flops = 2 * config.head_dim * budget.plans(config).plan_scores(prompt.num_tokens)
    plan_s = plan_flops / (machine.attention_gflops_per_s * 1e9 * PLAN_SHARE)
    keys_values_s = rest_s = 0.0
    for tile in prompt.tiles():
        listed = 4 * chain1.num_heads * chain1.head_dim * tile.num_tokens * budget.keys_per_row
        keys_values_s += machine.step_seconds(machine.seconds(tile.keys_values))
        rest_s += machine.step_seconds(
            machine.seconds(replace(tile.rest, attention_flops=min(tile.rest.attention_flops, listed)))
        )
    whole_s = keys_values_s + rest_s + plan_s
    return prompt.num_whole_layers * whole_s + (prompt.num_layers - prompt.num_whole_layers) * keys_values_s, plan_s
