"""How long a prompt takes: operations counted from the model's shape, at rates that are measured and corrected."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from colm.clock import Clock
from colm.flops import LayerFlops, causal_attention_flops
from colm.kv_position import KV_START, KvPosition
from colm.model.config import ChainConfig
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
    """Each is one tile of one layer; for several prompts at once, one tile of each."""

    def __sub__(self, other: "Work") -> "Work":
        return Work(
            linear_flops=self.linear_flops - other.linear_flops,
            attention_flops=self.attention_flops - other.attention_flops,
            num_steps=self.num_steps - other.num_steps,
        )

    @classmethod
    def shared(cls, works: Sequence["Work"]) -> "Work":
        """Several prompts' steps, made as one: their operations add up, each step counts once."""
        return cls(
            linear_flops=sum(work.linear_flops for work in works),
            attention_flops=sum(work.attention_flops for work in works),
            num_steps=max(work.num_steps for work in works),
        )


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

    def after_step(self, position: KvPosition, num_tokens: int) -> KvPosition:
        """Where the tile ends that begins at a position."""
        return position.after(min(self.tile_tokens, num_tokens - position.token), num_tokens)

    def work(self, num_tokens: int) -> Work:
        """All of a prompt's."""
        return self.work_before(KvPosition(self.num_layers, 0), num_tokens)

    def work_before(self, position: KvPosition, num_tokens: int) -> Work:
        """What has been done once the tile is there that ends at a position.

        The engine hands a tile out before it attends with it: that is part of the next step.
        """
        if position == KV_START:
            return Work()
        num_layer_steps = -(-num_tokens // self.tile_tokens)
        layer, token = position if position.token else (position.layer - 1, num_tokens)
        num_tiles = -(-token // self.tile_tokens)
        attended = (num_tiles - 1) * self.tile_tokens if layer < self.num_layers - 1 else 0

        def attention(num_first: int) -> int:
            return causal_attention_flops(
                num_queries=num_first, num_keys=num_first, num_heads=self.num_heads, head_dim=self.head_dim
            )

        return Work(
            linear_flops=(layer * num_tokens + token) * self.layer.keys_values
            + (layer * num_tokens + attended) * self.layer.rest,
            attention_flops=layer * attention(num_tokens) + attention(attended),
            num_steps=layer * num_layer_steps + num_tiles,
        )


@dataclass(kw_only=True, slots=True)
class CostModel:
    """Seconds of engine time: so much for each operation of a linear and of attention, and for each step.

    `observe` corrects the three by what work really took. Each is multiplied by a power of measured over predicted, in
    proportion to its share of the prediction: long prompts correct attention, short ones the steps. What is predicted
    for the same work then lies between what was and what was measured.
    """

    shape: PrefillShape
    linear_flop_s: float
    attention_flop_s: float
    step_s: float

    def seconds(self, work: Work) -> float:
        """What the engine will take for it."""
        return sum(self._parts_s(work))

    def shared_s(self, work: Work) -> float:
        """Of `seconds`, what it does not add to the steps of other work with which its own are made as one."""
        return self._parts_s(work)[2]

    def observe(self, work: Work, took_s: float) -> None:
        """Learn from what work has taken; nothing where nothing was measured."""
        parts_s = self._parts_s(work)
        predicted_s = sum(parts_s)
        if took_s <= 0 or predicted_s <= 0:
            return
        surprise = min(max(took_s / predicted_s, 1 / _MAX_SURPRISE), _MAX_SURPRISE)
        # [0, 1): a moving average over engine time, so a short step says little and a long one much.
        weight = -math.expm1(-took_s / CORRECTION_S)
        linear, attention, step = (surprise ** (weight * part_s / predicted_s) for part_s in parts_s)
        self.linear_flop_s *= linear
        self.attention_flop_s *= attention
        self.step_s *= step

    def _parts_s(self, work: Work) -> tuple[float, float, float]:
        return (
            work.linear_flops * self.linear_flop_s,
            work.attention_flops * self.attention_flop_s,
            work.num_steps * self.step_s,
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
