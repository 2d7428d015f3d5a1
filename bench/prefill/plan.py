"""Which cells of the paper's tables are run whole, which on a sample, and which are left to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench import paper
from bench.harness.contest import Measured
from bench.harness.units import length

MODES: Final[tuple[Measured, ...]] = ("modelled", "sampled", "whole")
"""From the cheapest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Presets at one length that take turns, so that a ratio is one of the same run; all run in the same way."""

    baseline: str
    presets: tuple[str, ...]
    """The baseline first."""
    num_tokens: int

    @property
    def name(self) -> str:
        """E.g. `llama-3.2-1b at 8K`."""
        return f"{self.baseline} at {length(self.num_tokens)}"


def groups(presets: Sequence[str], lengths: Sequence[int]) -> list[Group]:
    """The rows of these presets, with the baselines that their speed-ups are over; family by family, short ones first.

    Raises:
        ValueError: a preset is not a row of the paper's tables.
    """
    rows = paper.load().rows
    if unknown := [name for name in presets if name not in rows]:
        raise ValueError(f"{unknown} are not in the paper's prefill tables; rows are {', '.join(rows)}")
    families = dict.fromkeys(rows[name] for name in presets)
    return [
        Group(
            baseline=baseline,
            presets=(baseline, *(name for name in rows if name in presets and rows[name] == baseline != name)),
            num_tokens=num_tokens,
        )
        for baseline in families
        for num_tokens in sorted(set(lengths))
    ]


def choose_modes(costs: Mapping[Group, Mapping[Measured, float]], budget_s: float) -> dict[Group, Measured]:
    """How each group runs: as many as possible on a sample, then as many as possible whole, the cheapest first.

    Args:
        costs: predicted seconds of each way that is possible; a group that runs whole is sampled as well.
        budget_s: what all of them may take, as predicted.
    """
    chosen: dict[Group, Measured] = dict.fromkeys(costs, "modelled")
    left_s = budget_s
    for mode in MODES[1:]:
        able = [group for group in costs if mode in costs[group]]
        for group in sorted(able, key=lambda group: costs[group][mode]):
            if mode == "whole" and chosen[group] != "sampled":
                continue
            if costs[group][mode] <= left_s:
                left_s -= costs[group][mode]
                chosen[group] = mode
    return chosen
