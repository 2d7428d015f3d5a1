"""The paper's prefill tables on this machine: whole, on a sample, or by the model, as a budget of time allows.

Records of a group are written as soon as it is done, and a suite that starts again goes on after the groups that its
records hold. Before each group the rest of the budget is laid out anew, by what the groups before it took in truth.
"""

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.harness import records
from bench.harness.contest import Measured
from bench.harness.units import digits, duration, length
from bench.kernels.common import short
from bench.paper import Attention
from bench.prefill import record as recorded
from bench.prefill.cost import Costs, layer_of
from bench.prefill.plan import MODES, Group, Row, choose_modes
from bench.prefill.record import Bar, CellRecord, PeerRecord, Sample
from bench.prefill.timer import PeerTimed, Seen
from colm.model.config import ChainConfig
from colm.model.presets import preset

PRIOR_S = 20.0
"""So much of what was predicted is taken to have come true before anything has run."""


class Timer(Protocol):
    """What times a group; replaced in tests."""

    def keep(self, presets: Collection[str], *, with_peers: bool) -> None:
        """Other presets, and peers, have no group left."""

    def measure(self, group: Group, *, is_whole: bool, num_rounds: int) -> Seen:
        """Run it on a sample, or whole and on a sample."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is run and how.

    Args:
        groups: in their order.
        costs: what groups would take.
        budget_s: for all of them.
        path: of the records.
        environment: of this run, as every record states it.
        clock: in seconds.
    """

    groups: Sequence[Group]
    costs: Costs
    budget_s: float
    path: Path
    environment: Mapping[str, Any]
    clock: Callable[[], float] = time.monotonic

    def run(self, timer: Timer, say: Callable[[str], object] = sys.stderr.write) -> list[CellRecord | PeerRecord]:
        """Run what the records do not hold yet; returns what was added."""
        held = self._held()
        todo = [group for group in self.groups if not self._is(MODES[1:], group, held)]
        say(f"{len(self.groups) - len(todo)} of {len(self.groups)} groups are in {self.path} already\n")
        # On a sample so far; whole where time is left when all others are done.
        again = [group for group in self.groups if group not in todo and not self._is(MODES[-1:], group, held)]
        ends_s = self.clock() + self.budget_s
        added: list[CellRecord | PeerRecord] = []
        made: set[str] = set()
        met: set[ChainConfig] = set()
        predicted_s = taken_s = PRIOR_S
        while todo or again:
            pace, left_s = taken_s / predicted_s, ends_s - self.clock()
            found = {group: self.costs.of(group, made, met) for group in (*todo, *again)}
            paced = {
                group: {mode: pace * seconds for mode, seconds in cost.items() if group in todo or mode == "whole"}
                for group, (cost, _) in found.items()
            }
            modes = choose_modes(paced, left_s)
            group = next((group for group, mode in modes.items() if mode != "modelled"), None)
            if group is None:
                break
            whole = [each for each, mode in modes.items() if mode == "whole"]
            timer.keep({name for each in whole for name in each.presets}, with_peers=any(each.peers for each in whole))
            say(_progress(group, modes, paced, left_s))
            (todo if group in todo else again).remove(group)
            began_s = self.clock()
            fresh = self._measured(group, modes[group], found[group][1], timer)
            predicted_s += found[group][0][modes[group]]
            taken_s += self.clock() - began_s
            made = (made | set(group.presets) if modes[group] == "whole" else made) & {
                name for each in whole for name in each.presets
            }
            met |= {layer_of(preset(name)) for name in group.presets}
            if modes[group] == "sampled":
                again.append(group)
            added += self._written(fresh)
            for record in fresh:
                say(f"  {describe(record)}\n")
        for group in todo:
            if not group.is_for_peers and not all((*row, group.num_tokens) in held for row in group.rows):
                say(f"{group.name}: modelled\n")
                added += self._written(self._modelled(group, self.costs.of(group)[1]))
        return added

    def _held(self) -> dict[tuple[str, Attention, int], CellRecord]:
        """Cells that the records have of these conditions, by preset, attention and tokens."""
        wanted = (*recorded.where(self.environment), short(self.costs.dtype), self.costs.tile_tokens)
        held: dict[tuple[str, Attention, int], CellRecord] = {}
        for record in recorded.cells(recorded.read(self.path)):
            is_same = record.sparse is None or record.sparse == self.costs.budget.record()
            if record.conditions == wanted and is_same:
                held[record.key] = record
        return held

    def _is(
        self, modes: Collection[Measured], group: Group, held: Mapping[tuple[str, Attention, int], CellRecord]
    ) -> bool:
        """Whether all rows of a group have records of one of these modes."""
        found = [held.get((*row, group.num_tokens)) for row in group.rows]
        return all(record is not None and record.measured in modes for record in found)

    def _written(self, fresh: Sequence[CellRecord | PeerRecord]) -> Sequence[CellRecord | PeerRecord]:
        records.append(self.path, [record.model_dump(mode="json") for record in fresh])
        return fresh

    def _measured(self, group: Group, mode: Measured, no_room: str, timer: Timer) -> Sequence[CellRecord | PeerRecord]:
        is_whole = mode == "whole"
        num_rounds = self.costs.whole_rounds(group) if is_whole else self.costs.sampled_rounds(group)
        seen = timer.measure(group, is_whole=is_whole, num_rounds=num_rounds)
        turns = {row: each.whole_s for row, each in seen.rows.items()}
        if is_whole:
            bars = {row: Bar.over(each) for row, each in turns.items()}
            ratios = {row: _ratio_of_rounds(turns[group.rows[0]], each) for row, each in turns.items()}
        else:
            bars = {row: Bar.around(each.sample.total, each.sample.standard_error) for row, each in seen.rows.items()}
            ratios = _ratios_of_bars(group, bars)
        samples = {
            row: Sample.of(each.sample, bars[row].value if is_whole else None) for row, each in seen.rows.items()
        }
        reason = "" if is_whole else no_room or "the budget of time"
        cells = self._cells(group, mode, reason, bars, ratios, samples, num_rounds if is_whole else 0)
        return [*cells, *(self._peer(group, name, each, turns) for name, each in seen.peers.items())]

    def _modelled(self, group: Group, no_room: str) -> Sequence[CellRecord]:
        bars = {row: Bar.around(self.costs.row_s(row, group.num_tokens), 0.0) for row in group.rows}
        return self._cells(
            group, "modelled", no_room or "the budget of time", bars, _ratios_of_bars(group, bars), {}, 0
        )

    def _cells(
        self,
        group: Group,
        mode: Measured,
        reason: str,
        bars: Mapping[Row, Bar],
        ratios: Mapping[Row, Bar],
        samples: Mapping[Row, Sample],
        num_rounds: int,
    ) -> list[CellRecord]:
        return [
            CellRecord(
                **self._conditions(group),
                preset=row.preset,
                baseline=group.baseline,
                attention=row.attention,
                sparse=self.costs.budget.record() if row.attention == "sparse" else None,
                measured=mode,
                reason=reason,
                seconds=bars[row],
                over_baseline=ratios[row],
                num_rounds=num_rounds,
                sample=samples.get(row),
                machine=self.costs.machine.dump() if mode == "modelled" else None,
            )
            for row in group.rows
        ]

    def _peer(self, group: Group, name: str, seen: PeerTimed, turns: Mapping[Row, Sequence[float]]) -> PeerRecord:
        dense = {row.preset: turns[row] for row in group.rows if row.attention == "dense"}
        return PeerRecord(
            **self._conditions(group),
            peer=name,
            version=seen.version,
            baseline=group.baseline,
            reason=seen.absent,
            seconds=None if seen.absent else Bar.over(seen.seconds),
            num_rounds=len(seen.seconds),
            speedups={} if seen.absent else {key: _ratio_of_rounds(seen.seconds, each) for key, each in dense.items()},
        )

    def _conditions(self, group: Group) -> dict[str, Any]:
        return {
            "environment": dict(self.environment),
            "num_tokens": group.num_tokens,
            "dtype": short(self.costs.dtype),
            "tile_tokens": self.costs.tile_tokens,
        }


def _progress(
    group: Group, modes: Mapping[Group, Measured], costs: Mapping[Group, Mapping[Measured, float]], left_s: float
) -> str:
    numbers = {mode: sum(each == mode for each in modes.values()) for mode in dict.fromkeys(modes.values())}
    planned_s = sum(costs[each][mode] for each, mode in modes.items() if mode != "modelled")
    return (
        f"{group.name}: {modes[group]}, about {minutes(costs[group][modes[group]])}. "
        f"{minutes(max(0.0, left_s))} left, {minutes(planned_s)} of it planned: "
        f"{', '.join(f'{number} {mode}' for mode, number in numbers.items())}\n"
    )


def minutes(seconds: float) -> str:
    """E.g. 4 min 20 s."""
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"


def _ratio_of_rounds(baseline: Sequence[float], mine: Sequence[float]) -> Bar:
    return Bar.over([theirs / ours for theirs, ours in zip(baseline, mine, strict=True)])


def _ratios_of_bars(group: Group, bars: Mapping[Row, Bar]) -> dict[Row, Bar]:
    baseline = bars[group.rows[0]]
    return {
        row: Bar(value=1.0, low=1.0, high=1.0)
        if row == group.rows[0]
        else Bar(
            value=baseline.value / bar.value, low=baseline.low / bar.high, high=baseline.high / max(bar.low, 1e-12)
        )
        for row, bar in bars.items()
    }


def describe(record: CellRecord | PeerRecord) -> str:
    """One line: the time, the rate, the ratio, and how far a sample is off the whole."""
    if isinstance(record, PeerRecord):
        what = f"{record.peer} {length(record.num_tokens)}: "
        if record.seconds is None:
            return f"{what}absent: {record.reason}"
        return f"{what}{duration(record.seconds.value)}, ours {digits(record.speedups[record.baseline].value)}x"
    bar = record.seconds
    line = (
        f"{Row(record.preset, record.attention).name} {length(record.num_tokens)}: {duration(bar.value)} "
        f"({duration(bar.low)} .. {duration(bar.high)}), {digits(record.tokens_per_s)} tokens/s, "
        f"{digits(record.over_baseline.value)}x, {record.measured}"
    )
    if record.sample is not None and record.sample.off is not None:
        line += f"; its sample is {record.sample.off:+.1%} off"
        line += "" if record.sample.agrees else ", more than it should be"
    return line
