"""The paper's prefill tables on this machine: whole, on a sample, or by the model, as a budget of time allows.

A record of every cell is written as soon as its group is done, and a suite that starts again goes on after the groups
that its records hold.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from bench.harness import records
from bench.harness.contest import Measured
from bench.harness.units import digits, duration, length
from bench.kernels.common import short
from bench.prefill.case import CHECKED_TILE_TOKENS, check_engine, engine_of_random, prompt
from bench.prefill.estimate import NUM_STRATA, PER_STRATUM, Estimate, choose, estimate, strata
from bench.prefill.layer import KeysValues, SampledLayer, TileSeconds
from bench.prefill.memory import sampled_bytes, weights_bytes, working_bytes
from bench.prefill.plan import MODES, Group, choose_modes
from bench.prefill.record import Bar, CellRecord, Sample
from bench.roofline.machine import Machine
from bench.roofline.model import Prompt, prefill_s
from cluster.cli.output import human_bytes
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.presets import preset
from prefill_node.engine import PrefillEngine

QUICK_S = 20.0
"""A group that takes less is run in several rounds, a longer one once."""
WEIGHTS_GB_PER_S = 0.1
"""At which random weights are made; for the budget alone."""
AGREES_WITHIN = 0.05
"""A sample that is further from the whole is pointed out."""


class Timer(Protocol):
    """What times a group; replaced in tests."""

    def whole(self, group: Group, num_rounds: int) -> Mapping[str, Sequence[float]]:
        """Seconds of each preset's prefill, one a round."""

    def sampled(self, group: Group, num_repeats: int) -> Mapping[str, Estimate]:
        """Each preset's prefill as a sample of one layer says."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is run and how.

    Args:
        groups: in their order.
        dtype: of weights and computation.
        tile_tokens: of the engine.
        num_rounds: of groups that are quick.
        budget_s: for all groups, as predicted.
        available_bytes: memory that may be taken.
        machine: this one, calibrated; predicts and models.
        path: of the records.
        environment: of this run, as every record states it.
    """

    groups: Sequence[Group]
    dtype: torch.dtype
    tile_tokens: int
    num_rounds: int
    budget_s: float
    available_bytes: int
    machine: Machine
    path: Path
    environment: Mapping[str, Any]

    def run(self, timer: Timer, say: Callable[[str], object] = sys.stderr.write) -> list[CellRecord]:
        """Run what the records do not hold yet; returns what was added."""
        held = {
            record.key: record
            for record in map(CellRecord.model_validate, records.read(self.path))
            if record.conditions == self._conditions
        }

        def is_done(group: Group) -> bool:
            found = [held.get((name, "dense", group.num_tokens)) for name in group.presets]
            return all(record is not None and record.measured != "modelled" for record in found)

        todo = [group for group in self.groups if not is_done(group)]
        say(f"{len(self.groups) - len(todo)} of {len(self.groups)} groups are in {self.path} already\n")
        costs = {group: self._costs(group) for group in todo}
        modes = choose_modes({group: cost for group, (cost, _) in costs.items()}, self.budget_s)
        added: list[CellRecord] = []
        for group in todo:
            mode, (cost, no_room) = modes[group], costs[group]
            if mode == "modelled" and all((name, "dense", group.num_tokens) in held for name in group.presets):
                continue
            say(f"{group.name}: {mode}, predicted {duration(_predicted_s(mode, cost))}\n")
            fresh = self._cells(group, mode, cost, no_room, timer)
            records.append(self.path, [record.model_dump(mode="json") for record in fresh])
            for record in fresh:
                say(f"  {describe(record)}\n")
            added += fresh
        return added

    @property
    def _conditions(self) -> tuple[object, ...]:
        where = tuple(self.environment.get(name) for name in ("commit", "cpu", "cpu_family", "cpu_model", "threads"))
        return (*where, short(self.dtype), self.tile_tokens)

    def _modelled(self, group: Group) -> dict[str, float]:
        """Seconds of each preset, as this machine's file has it."""
        prompts = {
            name: Prompt(config=preset(name), num_tokens=group.num_tokens, tile_tokens=self.tile_tokens)
            for name in group.presets
        }
        return {name: prefill_s(self.machine, prompt) for name, prompt in prompts.items()}

    def _costs(self, group: Group) -> tuple[dict[Measured, float], str]:
        """Predicted seconds of every way that has room, and why the whole has none."""
        configs = [preset(name) for name in group.presets]
        run_s = self._modelled(group)
        share = min(1.0, NUM_STRATA * PER_STRATUM * self.tile_tokens / group.num_tokens)
        layer_s = sum(each / config.num_layers for each, config in zip(run_s.values(), configs, strict=True))
        costs: dict[Measured, float] = {}
        needed = sampled_bytes(configs, self.dtype, num_tokens=group.num_tokens, tile_tokens=self.tile_tokens)
        if needed <= self.available_bytes:
            costs["sampled"] = layer_s * share * self._rounds(layer_s * share)
        weights = sum(weights_bytes(config, self.dtype) for config in configs)
        needed = weights + max(
            working_bytes(config, self.dtype, num_tokens=group.num_tokens, tile_tokens=self.tile_tokens)
            for config in configs
        )
        no_room = ""
        if needed <= self.available_bytes:
            total_s = sum(run_s.values())
            costs["whole"] = total_s * self._rounds(total_s) + weights / (WEIGHTS_GB_PER_S * 1e9)
        else:
            no_room = f"whole needs {human_bytes(needed)}, {human_bytes(self.available_bytes)} are available"
        return costs, no_room

    def _rounds(self, predicted_s: float) -> int:
        return self.num_rounds if predicted_s <= QUICK_S else 1

    def _cells(
        self, group: Group, mode: Measured, cost: Mapping[Measured, float], no_room: str, timer: Timer
    ) -> list[CellRecord]:
        samples: Mapping[str, Estimate] = {}
        if mode != "modelled":
            samples = timer.sampled(group, self._rounds(cost["sampled"] / self.num_rounds))
        if mode == "whole":
            turns = timer.whole(group, self._rounds(sum(self._modelled(group).values())))
            bars = {name: Bar(value=median(each), low=min(each), high=max(each)) for name, each in turns.items()}
            ratios = {name: _ratio_of_rounds(turns[group.baseline], each) for name, each in turns.items()}
            num_rounds = len(turns[group.baseline])
        else:
            if mode == "sampled":
                bars = {name: Bar.around(each.total, each.standard_error) for name, each in samples.items()}
            else:
                bars = {name: Bar.around(each, 0.0) for name, each in self._modelled(group).items()}
            ratios = {name: _ratio_of_bars(bars[group.baseline], bar) for name, bar in bars.items()}
            num_rounds = 0
        budget = "" if mode == "whole" else no_room or "the budget of time"
        return [
            CellRecord(
                environment=dict(self.environment),
                preset=name,
                baseline=group.baseline,
                attention="dense",
                num_tokens=group.num_tokens,
                dtype=short(self.dtype),
                tile_tokens=self.tile_tokens,
                measured=mode,
                reason=budget,
                seconds=bars[name],
                over_baseline=ratios[name],
                num_rounds=num_rounds,
                sample=_sample(samples.get(name)),
                machine=self.machine.dump() if mode == "modelled" else None,
            )
            for name in group.presets
        ]


def _predicted_s(mode: Measured, cost: Mapping[Measured, float]) -> float:
    """A group that runs whole is sampled too; the model takes no time."""
    return sum(cost[each] for each in MODES[1 : MODES.index(mode) + 1])


def _sample(found: Estimate | None) -> Sample | None:
    if found is None:
        return None
    bar = Bar.around(found.total, found.standard_error)
    return Sample(seconds=bar, num_timed=found.num_timed, num_tiles=found.num_tiles)


def _ratio_of_rounds(baseline: Sequence[float], mine: Sequence[float]) -> Bar:
    ratios = [theirs / ours for theirs, ours in zip(baseline, mine, strict=True)]
    return Bar(value=median(ratios), low=min(ratios), high=max(ratios))


def _ratio_of_bars(baseline: Bar, mine: Bar) -> Bar:
    if mine is baseline:
        return Bar(value=1.0, low=1.0, high=1.0)
    return Bar(
        value=baseline.value / mine.value, low=baseline.low / mine.high, high=baseline.high / max(mine.low, 1e-12)
    )


def describe(record: CellRecord) -> str:
    """One line: the time, the rate, the ratio, and a sample that does not agree with the whole."""
    bar = record.seconds
    line = (
        f"{record.preset} {length(record.num_tokens)}: {duration(bar.value)} "
        f"({duration(bar.low)} .. {duration(bar.high)}), {digits(record.tokens_per_s)} tokens/s, "
        f"{digits(record.over_baseline.value)}x, {record.measured}"
    )
    if record.measured == "whole" and record.sample is not None:
        off = record.sample.seconds.value / bar.value - 1
        line += f"; its sample is {off:+.1%} off" + (", more than it should be" if abs(off) > AGREES_WITHIN else "")
    return line


@dataclass(kw_only=True)
class EngineTimer:
    """The timer of real runs. Engines of one family are kept from one length to the next.

    Args:
        dtype: of weights and computation.
        tile_tokens: of the engine.
        seed: of weights, prompts and samples.
        clock: in seconds.
    """

    dtype: torch.dtype
    tile_tokens: int
    seed: int
    clock: Callable[[], float] = time.perf_counter
    _engines: dict[str, PrefillEngine] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)

    def whole(self, group: Group, num_rounds: int) -> Mapping[str, Sequence[float]]:
        """Rounds in which all presets take turns; a short prompt of each warms up."""
        self._engines = {name: engine for name, engine in self._engines.items() if name in group.presets}
        for name in group.presets:
            if name not in self._engines:
                self._check(name)
                self._engines[name] = engine_of_random(preset(name), self.dtype, self.tile_tokens, self.seed)
            self._prefill(name, min(self.tile_tokens, group.num_tokens))
        seconds: dict[str, list[float]] = {name: [] for name in group.presets}
        for _ in range(num_rounds):
            for name in group.presets:
                began_s = self.clock()
                self._prefill(name, group.num_tokens)
                seconds[name].append(self.clock() - began_s)
        return seconds

    def sampled(self, group: Group, num_repeats: int) -> Mapping[str, Estimate]:
        """Tiles of one layer of each preset; the presets take turns at every tile."""
        configs = {name: preset(name) for name in group.presets}
        held: dict[tuple[int, int], KeysValues] = {}
        layers = {}
        for name, config in configs.items():
            self._check(name)
            kv_format = KvFormat.of(config, self.dtype)
            heads = (kv_format.num_kv_heads, kv_format.head_dim)
            if heads not in held:
                held[heads] = KeysValues.random(kv_format, group.num_tokens, self.seed)
            layers[name] = SampledLayer(
                config, self.dtype, held[heads], tile_tokens=self.tile_tokens, seed=self.seed, clock=self.clock
            )
        return sample_layers(
            configs,
            {name: layer.time for name, layer in layers.items()},
            num_tokens=group.num_tokens,
            tile_tokens=self.tile_tokens,
            num_repeats=num_repeats,
            seed=self.seed,
        )

    def _prefill(self, name: str, num_tokens: int) -> None:
        deque(self._engines[name].run(prompt(preset(name), num_tokens, self.seed)), maxlen=0)

    def _check(self, name: str) -> None:
        if name not in self._checked:
            check_engine(preset(name), self.dtype, min(self.tile_tokens, CHECKED_TILE_TOKENS), self.seed)
            self._checked.add(name)


def sample_layers(
    configs: Mapping[str, ChainConfig],
    layers: Mapping[str, Callable[[int, int], TileSeconds]],
    *,
    num_tokens: int,
    tile_tokens: int,
    num_repeats: int,
    seed: int,
) -> dict[str, Estimate]:
    """Prefills of several models from tiles of one layer of each, which take turns at every tile.

    Args:
        configs: of the models, by name.
        layers: time the tile from one token to another.
        num_tokens: of the prompt.
        tile_tokens: of the engine.
        num_repeats: turns of each tile, of which the median counts.
        seed: of the sample.
    """
    num_tiles = -(-num_tokens // tile_tokens)
    groups = strata(num_tiles)

    def bounds(tile: int) -> tuple[int, int]:
        return tile * tile_tokens, min((tile + 1) * tile_tokens, num_tokens)

    def known(tile: int) -> tuple[float, float]:
        start, stop = bounds(tile)
        rows = stop - start
        return rows, rows * start + rows * (rows + 1) / 2

    for layer in layers.values():
        layer(*bounds(0))  # the first call of an operation also sets things up
    costs: dict[str, dict[int, float]] = {name: {} for name in configs}
    for tile in choose(groups, seed=seed):
        turns: dict[str, list[float]] = {name: [] for name in configs}
        for _ in range(num_repeats):
            for name, layer in layers.items():
                seen = layer(*bounds(tile))
                whole, cut = configs[name].num_layers - 1, 1
                turns[name].append((whole + cut) * seen.keys_values_s + whole * seen.rest_s)
        for name, each in turns.items():
            costs[name][tile] = median(each)
    return {name: estimate(groups, each, known, num_layers=configs[name].num_layers) for name, each in costs.items()}
