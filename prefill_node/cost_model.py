"""How long a prompt takes: operations counted from the model's shape, at rates that are measured and corrected."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self

import numpy as np

from colm.clock import Clock
from colm.flops import LayerFlops, causal_attention_flops
from colm.kv_position import KV_START, KvPosition
from colm.model.config import ChainConfig
from colm.nodes import PromptCost
from prefill_node.engine import PrefillEngine

CORRECTION_S = 10.0
"""Engine time over which what was measured replaces what had been believed, to 1 - 1/e."""
_MAX_SURPRISE = 8.0
"""What took longer by a larger factor counts as if by this one: the machine stood still meanwhile."""
_CALIBRATION_TOKENS = 128
_CALIBRATION_KEYS = 4096
_CALIBRATION_QUERIES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What an engine does for a prompt, or for a part of one."""

    linear_flops: int = 0
    attention_flops: int = 0
    num_steps: int = 0
    """Each is one tile of one layer, for several prompts at once one tile of each; or, of a sparse layer, one of its
    attention or a part of its plan."""
    sparse_flops: int = 0
    """Of attention to what plans list."""
    plan_flops: int = 0
    """Scores of plans and audits."""
    num_kept: int = 0
    """Tiles of one layer that were kept from an earlier prompt, laid where those behind them read them."""

    def __sub__(self, other: "Work") -> "Work":
        return Work(
            linear_flops=self.linear_flops - other.linear_flops,
            attention_flops=self.attention_flops - other.attention_flops,
            num_steps=self.num_steps - other.num_steps,
            sparse_flops=self.sparse_flops - other.sparse_flops,
            plan_flops=self.plan_flops - other.plan_flops,
            num_kept=self.num_kept - other.num_kept,
        )

    @classmethod
    def shared(cls, works: Sequence["Work"]) -> "Work":
        """Several prompts' steps, made as one: their operations add up, each step counts once."""
        if len(works) == 1:
            return works[0]
        sums = {each.name: sum(getattr(work, each.name) for work in works) for each in fields(cls)}
        return cls(**sums | {"num_steps": max(work.num_steps for work in works)})


class SparsePrompt(Protocol):
    """One prompt's sparse attention, as far as it is known: `PromptPlans`."""

    def covers(self, layer: int, num_tokens: int) -> bool:
        """Whether a layer is planned."""

    def density(self, layer: int, num_tokens: int) -> float:
        """Share of the causal pairs that it attends to; what is expected before it has been planned."""

    def num_plan_steps(self, layer: int, num_tokens: int) -> int:
        """Pauses of its plan and audit; what is expected before."""

    def plan_scores(self, num_tokens: int) -> int:
        """Products of a query and a key that a layer's plan and audit make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillShape:
    """What the operations of a prefill can be counted from.

    Args:
        layer: linears of one token.
        num_heads: chain 1's query heads.
        tile_tokens: of the engine.
    """

    layer: LayerFlops
    num_layers: int
    num_heads: int
    head_dim: int
    tile_tokens: int

    @classmethod
    def of(cls, config: ChainConfig, tile_tokens: int) -> Self:
        """The shape of a model's chain 1."""
        return cls(
            layer=LayerFlops.of(config),
            num_layers=config.num_layers,
            num_heads=config.chains[0],
            head_dim=config.head_dim,
            tile_tokens=tile_tokens,
        )

    def after_pause(
        self,
        position: KvPosition,
        num_pauses: int,
        num_tokens: int,
        sparse: SparsePrompt | None,
        num_cached_tokens: int = 0,
    ) -> tuple[KvPosition, int]:
        """Where the next step ends: (position, steps since that brought no tile)."""
        if sparse is not None and self._is_planned(position, num_tokens, sparse):
            layer = position.layer - 1
            # One pause for each part of the plan, and one before each tile of the attention.
            if num_pauses < sparse.num_plan_steps(layer, num_tokens) - (-num_tokens // self.tile_tokens):
                return position, num_pauses + 1
        return self.after_step(position, num_tokens, num_cached_tokens), 0

    def sparse_work_before(self, position: KvPosition, num_pauses: int, num_tokens: int, sparse: SparsePrompt) -> Work:
        """The same as `work_before` of a sparse prompt, whose planned layers attend once all their tiles are there.

        Args:
            position: where the last tile ended.
            num_pauses: steps since that brought no tile.
            num_tokens: of the prompt.
            sparse: its plans.
        """
        if position == KV_START:
            return Work()
        num_tiles = -(-num_tokens // self.tile_tokens)
        layer, token = position if position.token else (position.layer - 1, num_tokens)
        is_between = self._is_planned(position, num_tokens, sparse)
        parts = [(each, 1.0, 1.0) for each in range(min(layer, self.num_layers - 1))]
        if layer < self.num_layers - 1 and not sparse.covers(layer, num_tokens):
            parts.append((layer, 1.0, max(0, -(-token // self.tile_tokens) - 1) / num_tiles))
        elif is_between:
            num_plan_steps = max(1, sparse.num_plan_steps(layer, num_tokens))
            num_attended = max(0, num_pauses - num_plan_steps - 1)
            parts.append((layer, min(1.0, num_pauses / num_plan_steps), min(1.0, num_attended / num_tiles)))
        causal = causal_attention_flops(
            num_queries=num_tokens, num_keys=num_tokens, num_heads=self.num_heads, head_dim=self.head_dim
        )
        plan_flops = 2 * self.head_dim * sparse.plan_scores(num_tokens)
        rest, dense, listed, plans, extra = 0.0, 0.0, 0.0, 0.0, float(num_pauses if is_between else 0)
        for each, planned, attended in parts:
            rest += attended
            if sparse.covers(each, num_tokens):
                plans += planned
                if (density := sparse.density(each, num_tokens)) < 1.0:
                    listed += density * attended
                else:
                    dense += attended
                extra += (each < layer) * (num_tiles + sparse.num_plan_steps(each, num_tokens))
            else:
                dense += attended
        return Work(
            linear_flops=(layer * num_tokens + token) * self.layer.keys_values
            + int(rest * num_tokens) * self.layer.rest,
            attention_flops=int(dense * causal),
            sparse_flops=int(listed * causal),
            plan_flops=int(plans * plan_flops),
            num_steps=layer * num_tiles + -(-token // self.tile_tokens) + int(extra),
        )

    def _is_planned(self, position: KvPosition, num_tokens: int, sparse: SparsePrompt) -> bool:
        """Whether a layer that is planned has all its tiles there, and the next one has none."""
        layer = position.layer - 1
        return not position.token and 0 <= layer < self.num_layers - 1 and sparse.covers(layer, num_tokens)

    def after_step(self, position: KvPosition, num_tokens: int, num_cached_tokens: int = 0) -> KvPosition:
        """Where the tile ends that is computed next, at a position or behind what its layer has of kept tokens."""
        begin = position.at_least(num_cached_tokens)
        return begin.after(min(self.tile_tokens, num_tokens - begin.token), num_tokens)

    def work(self, num_tokens: int) -> Work:
        """All of a prompt's."""
        return self.work_before(KvPosition(self.num_layers, 0), num_tokens)

    def work_before(self, position: KvPosition, num_tokens: int, num_cached_tokens: int = 0) -> Work:
        """What has been done once the tile is there that ends at a position.

        The engine hands a tile out before it attends with it: that is part of the next step.

        Args:
            position: where it ends.
            num_tokens: of the prompt.
            num_cached_tokens: of those, the first ones, whose tiles are kept.
        """
        if position == KV_START:
            return Work()
        layer, token = position if position.token else (position.layer - 1, num_tokens)
        num_tiles = -(-token // self.tile_tokens)
        attended = (num_tiles - 1) * self.tile_tokens if layer < self.num_layers - 1 else 0

        def new(num_first: int) -> int:
            return max(0, num_first - num_cached_tokens)

        def attention(num_first: int) -> int:
            return causal_attention_flops(
                num_queries=new(num_first),
                num_keys=num_first,
                num_heads=self.num_heads,
                head_dim=self.head_dim,
            )

        return Work(
            linear_flops=(layer * new(num_tokens) + new(token)) * self.layer.keys_values
            + (layer * new(num_tokens) + new(attended)) * self.layer.rest,
            attention_flops=layer * attention(num_tokens) + attention(attended),
            num_steps=layer * self._num_tiles(new(num_tokens)) + self._num_tiles(new(token)),
            num_kept=layer * self._num_tiles(num_cached_tokens) + self._num_tiles(min(token, num_cached_tokens)),
        )

    def _num_tiles(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tile_tokens)


@dataclass(kw_only=True, slots=True)
class CostModel:
    """Seconds of engine time: so much for each operation of a linear and of attention, and for each step.

    `observe` corrects them by what work really took. Each is multiplied by a power of measured over predicted, in
    proportion to its share of the prediction: long prompts correct attention, short ones the steps. What is predicted
    for the same work then lies between what was and what was measured.
    """

    shape: PrefillShape
    linear_flop_s: float
    attention_flop_s: float
    step_s: float
    sparse_factor: float = 1.1
    """An operation of sparse attention, in those of dense attention."""
    plan_factor: float = 2.0
    """An operation of a plan, likewise: half as many are made of a score, and its exponential takes as long."""
    kept_s: float = 1e-4
    """A tile that is kept: copied to where others attend to it."""

    def seconds(self, work: Work) -> float:
        """What the engine will take for it."""
        return sum(self._parts_s(work))

    def shared_s(self, work: Work) -> float:
        """Of `seconds`, what it does not add to the steps of other work with which its own are made as one."""
        return self._parts_s(work)[2]

    def prompt_cost(self) -> PromptCost:
        """The same by a prompt's length alone: exact where its tiles are full, else less by a step a layer at most."""
        tile_tokens = self.shape.tile_tokens
        one_s, two_s = (self.seconds(self.shape.work(num_tiles * tile_tokens)) for num_tiles in (1, 2))
        pair_s = (two_s - 2 * one_s) / (2 * tile_tokens**2)
        return PromptCost(token_s=one_s / tile_tokens - pair_s * tile_tokens, pair_s=pair_s)

    def observe(self, work: Work, took_s: float) -> None:
        """Learn from what work has taken; nothing where nothing was measured."""
        parts_s = self._parts_s(work)
        predicted_s = sum(parts_s)
        if took_s <= 0 or predicted_s <= 0:
            return
        surprise = min(max(took_s / predicted_s, 1 / _MAX_SURPRISE), _MAX_SURPRISE)
        # [0, 1): a moving average over engine time, so a short step says little and a long one much.
        weight = -math.expm1(-took_s / CORRECTION_S)
        linear, attention, step, listed, plan, kept = (
            surprise ** (weight * part_s / predicted_s) for part_s in parts_s
        )
        self.linear_flop_s *= linear
        self.attention_flop_s *= attention
        self.step_s *= step
        self.sparse_factor *= listed
        self.plan_factor *= plan
        self.kept_s *= kept

    def _parts_s(self, work: Work) -> tuple[float, float, float, float, float, float]:
        return (
            work.linear_flops * self.linear_flop_s,
            work.attention_flops * self.attention_flop_s,
            work.num_steps * self.step_s,
            work.sparse_flops * self.sparse_factor * self.attention_flop_s,
            work.plan_flops * self.plan_factor * self.attention_flop_s,
            work.num_kept * self.kept_s,
        )


def calibrate(engine: PrefillEngine, clock: Clock) -> CostModel:
    """The cost model of an engine, from a few steps of short prompts and one attention over a long context."""
    shape = PrefillShape.of(engine.config, engine.tile_tokens)
    _, step_s = _one_step(engine, shape, clock, 1)
    num_tokens = min(_CALIBRATION_TOKENS, engine.tile_tokens, engine.config.max_context)
    work, took_s = _one_step(engine, shape, clock, num_tokens)
    attends_s = []
    for _ in range(2):  # the first call of an operation also sets things up
        began_s = clock.now()
        engine.probe_attention(num_queries=_CALIBRATION_QUERIES, num_keys=_CALIBRATION_KEYS)
        attends_s.append(clock.now() - began_s)
    attention_flops = causal_attention_flops(
        num_queries=_CALIBRATION_QUERIES,
        num_keys=_CALIBRATION_KEYS,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
    )
    return CostModel(
        shape=shape,
        # More tokens may take no longer than one, where the weights' way from memory is what takes the time.
        linear_flop_s=max(took_s - step_s, took_s / 8) / work.linear_flops,
        attention_flop_s=min(attends_s) / attention_flops,
        step_s=step_s,
    )


def _one_step(engine: PrefillEngine, shape: PrefillShape, clock: Clock, num_tokens: int) -> tuple[Work, float]:
    """The last of the first three steps of a prompt: (its work, its time)."""
    steps = engine.run(np.zeros(num_tokens, dtype=np.int64))
    position, took_s, work = KV_START, 0.0, Work()
    for _ in range(min(3, shape.num_layers)):
        began_s, began = clock.now(), position
        next(steps).k_KTD.cpu()  # a GPU has computed it only then
        took_s, position = clock.now() - began_s, shape.after_step(position, num_tokens)
        work = shape.work_before(position, num_tokens) - shape.work_before(began, num_tokens)
    return work, took_s
