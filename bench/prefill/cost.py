"""What a group would take in time and memory, before it runs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from bench.harness.contest import Measured
from bench.prefill.case import CHECKED_LAYERS, CHECKED_TILE_TOKENS
from bench.prefill.memory import sampled_bytes, weights_bytes, working_bytes
from bench.prefill.plan import Group, Row
from bench.prefill.sampling import share_timed
from bench.prefill.sparse import Budget, sparse_s
from bench.roofline.machine import Machine
from bench.roofline.model import Prompt, prefill_s
from cluster.cli.output import human_bytes
from colm.flops import prefill_flops
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.model.transformer import slice_config

WEIGHTS_GB_PER_S: Final = 0.2
"""At which random weights are made."""
KEYS_GB_PER_S: Final = 1.0
"""At which a sample's keys and values are."""
CHECKED_SHARE: Final = 1 / 16
"""Of the products' rate, that the check of a layer in float64 reaches."""
PEER_TIMES: Final[Mapping[str, float]] = {"transformers": 1.8, "llama.cpp": 3.0}
"""Of our baseline's time; a first guess."""
WHOLE_ROUNDS_S: Final = 60.0
"""As many rounds of whole prefills as fit into this, but one at least."""
SAMPLED_ROUNDS_S: Final = 15.0
"""Likewise of turns of a sample."""
PASSES_PER_WHOLE: Final = 2
"""Turns of a sample around each whole prefill: one before, one behind."""


def layer_of(config: ChainConfig) -> ChainConfig:
    """One layer of chain 1: presets for which this is the same have the same layers, and samples of them in common."""
    return replace(slice_config(config, 1), num_layers=1)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Predictions of a suite.

    Args:
        machine: this one, calibrated.
        dtype: of weights and computation.
        tile_tokens: of the engine.
        num_rounds: at most.
        available_bytes: memory that may be taken.
        budget: of the sparse rows.
        peers: those that are installed.
    """

    machine: Machine
    dtype: torch.dtype
    tile_tokens: int
    num_rounds: int
    available_bytes: int
    budget: Budget
    peers: Collection[str] = ()
    _row_s: dict[tuple[Row, int], tuple[float, float]] = field(default_factory=dict, repr=False)

    def row_s(self, row: Row, num_tokens: int) -> float:
        """A whole prefill, as this machine's rates say."""
        return self._modelled(row, num_tokens)[0]

    def of(
        self, group: Group, made: Collection[str] = (), met: Collection[ChainConfig] = ()
    ) -> tuple[dict[Measured, float], str]:
        """Predicted seconds of every way that has room, and why the whole has none.

        Args:
            group: what shall run.
            made: presets whose weights are there already.
            met: layers that have been made and checked, as `layer_of` has them.
        """
        costs: dict[Measured, float] = {}
        no_room = self._no_room_for_whole(group)
        setup_s = self._setup_s(group, met)
        sampled_s = self._turn_s(group) * self.sampled_rounds(group) + setup_s
        if not group.is_for_peers and self._sampled_bytes(group) <= self.available_bytes:
            costs["sampled"] = sampled_s
        if not no_room:
            weights = sum(weights_bytes(preset(name), self.dtype) for name in group.presets if name not in made)
            round_s = self._round_s(group)
            round_s += PASSES_PER_WHOLE * sum(self._sample_s(row, group.num_tokens) for row in group.rows)
            costs["whole"] = self.whole_rounds(group) * round_s + setup_s + weights / (WEIGHTS_GB_PER_S * 1e9)
        return costs, no_room

    def whole_rounds(self, group: Group) -> int:
        """Of a group that runs whole."""
        return self._rounds(WHOLE_ROUNDS_S, self._round_s(group))

    def sampled_rounds(self, group: Group) -> int:
        """Of a group that runs on a sample."""
        return self._rounds(SAMPLED_ROUNDS_S, self._turn_s(group))

    def _rounds(self, within_s: float, round_s: float) -> int:
        return max(1, min(self.num_rounds, int(within_s / round_s)))

    def _round_s(self, group: Group) -> float:
        """Whole prefills of all rows and peers."""
        beside = sum(PEER_TIMES[name] for name in group.peers if name in self.peers)
        rows_s = [self.row_s(row, group.num_tokens) for row in group.rows]
        return sum(rows_s) + beside * rows_s[0]

    def _turn_s(self, group: Group) -> float:
        """One turn of each layer; rows of the same layers share it."""
        layers = {(layer_of(preset(row.preset)), row.attention): row for row in group.rows}
        return sum(self._sample_s(row, group.num_tokens) for row in layers.values())

    def _sample_s(self, row: Row, num_tokens: int) -> float:
        run_s, plan_s = self._modelled(row, num_tokens)
        layer_s = run_s / preset(row.preset).num_layers
        return plan_s + (layer_s - plan_s) * share_timed(num_tokens, self.tile_tokens)

    def _setup_s(self, group: Group, met: Collection[ChainConfig]) -> float:
        """Of keys and values that a sample attends to, and of layers that nobody has met: made and checked."""
        held = max(preset(name).kv_dim for name in group.presets) * 2 * group.num_tokens * self.dtype.itemsize
        seconds = held / (KEYS_GB_PER_S * 1e9)
        num_tokens = CHECKED_TILE_TOKENS + CHECKED_TILE_TOKENS // 4
        for layer in {layer_of(preset(name)) for name in group.presets} - set(met):
            of_check = replace(layer, num_layers=CHECKED_LAYERS, vocab_size=1)
            # For the definition, for the engine that is held against it, and for the sample.
            seconds += 3 * weights_bytes(of_check, self.dtype) / (WEIGHTS_GB_PER_S * 1e9)
            flops = CHECKED_LAYERS * prefill_flops(of_check, num_tokens)  # the definition runs the last layer too
            seconds += flops / (self.machine.gemm_gflops_per_s * 1e9 * CHECKED_SHARE)
        return seconds

    def _modelled(self, row: Row, num_tokens: int) -> tuple[float, float]:
        if (row, num_tokens) not in self._row_s:
            prompt = Prompt(config=preset(row.preset), num_tokens=num_tokens, tile_tokens=self.tile_tokens)
            self._row_s[row, num_tokens] = (
                (prefill_s(self.machine, prompt), 0.0)
                if row.attention == "dense"
                else sparse_s(self.machine, prompt, self.budget)
            )
        return self._row_s[row, num_tokens]

    def _planning_bytes(self, group: Group) -> int:
        sparse = [preset(row.preset) for row in group.rows if row.attention == "sparse"]
        return max(
            (self.budget.plans(each).memory_bytes(group.num_tokens, self.tile_tokens) for each in sparse), default=0
        )

    def _sampled_bytes(self, group: Group) -> int:
        layers = list({layer_of(config): config for config in map(preset, group.presets)}.values())
        sizes = {"num_tokens": group.num_tokens, "tile_tokens": self.tile_tokens}
        return sampled_bytes(layers, self.dtype, **sizes) + self._planning_bytes(group)

    def _no_room_for_whole(self, group: Group) -> str:
        configs = [preset(name) for name in group.presets]
        sizes = {"num_tokens": group.num_tokens, "tile_tokens": self.tile_tokens}
        needed = sum(weights_bytes(config, self.dtype) for config in configs)
        needed += sum(weights_bytes(configs[0], self.dtype) for name in group.peers if name in self.peers)
        needed += max(working_bytes(config, self.dtype, **sizes) for config in configs) + self._planning_bytes(group)
        if needed <= self.available_bytes:
            return ""
        return f"whole needs {human_bytes(needed)}, {human_bytes(self.available_bytes)} are available"
