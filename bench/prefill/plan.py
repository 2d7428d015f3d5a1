"""Which cells of the paper's tables are run whole, which on a sample, and which are left to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from bench import paper
from bench.harness.contest import Measured
from bench.harness.units import length
from bench.paper import Attention

MODES: Final[tuple[Measured, ...]] = ("modelled", "sampled", "whole")
"""From the cheapest."""


class Row(NamedTuple):
    """What takes turns: a preset, and whether its attention is sparse."""

    preset: str
    attention: Attention

    @property
    def name(self) -> str:
        """E.g. `llama-3.2-1b sparse`."""
        return self.preset if self.attention == "dense" else f"{self.preset} {self.attention}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rows at one length that take turns, so that a ratio is one of the same run; all run in the same way."""

    rows: tuple[Row, ...]
    """The dense baseline first."""
    num_tokens: int
    peers: tuple[str, ...] = ()
    """Other software that prefills the baseline's shape in the same turns, where the rows run whole."""
    is_for_peers: bool = False
    """The paper's tables do not have the length: it runs whole, beside peers, or not at all."""

    @property
    def baseline(self) -> str:
        """The preset that the rows' speed-ups are over."""
        return self.rows[0].preset

    @property
    def presets(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(row.preset for row in self.rows))

    @property
    def name(self) -> str:
        """E.g. `llama-3.2-1b at 8K`."""
        return f"{self.baseline} at {length(self.num_tokens)}"


def groups(
    presets: Sequence[str],
    lengths: Sequence[int],
    *,
    peers: Sequence[str] = (),
    peers_baseline: str = "",
    peer_lengths: Sequence[int] = (),
) -> list[Group]:
    """The rows of these presets, with the baselines that their speed-ups are over; short ones first.

    A preset's sparse row stands at the lengths at which the paper has one.

    Args:
        presets: of the paper's tables.
        lengths: of their prompts.
        peers: what else runs the shape of `peers_baseline`.
        peers_baseline: a baseline of the tables.
        peer_lengths: where peers run; those that `lengths` does not have are groups of their own.

    Raises:
        ValueError: a preset is not a row of the paper's tables.
    """
    tables = paper.load()
    rows = tables.rows
    if unknown := [name for name in presets if name not in rows]:
        raise ValueError(f"{unknown} are not in the paper's prefill tables; rows are {', '.join(rows)}")
    found = []
    for baseline in dict.fromkeys(rows[name] for name in presets):
        named = [name for name in rows if name in presets and rows[name] == baseline]
        at_peers = set(peer_lengths) if peers and baseline == peers_baseline else set()
        for num_tokens in {*lengths, *at_peers}:
            sparse = [name for name in named if (name, "sparse", num_tokens) in tables.cells]
            found.append(
                Group(
                    rows=(
                        *(Row(name, "dense") for name in dict.fromkeys((baseline, *named))),
                        *(Row(name, "sparse") for name in sparse),
                    ),
                    num_tokens=num_tokens,
                    peers=tuple(peers) if num_tokens in at_peers else (),
                    is_for_peers=num_tokens not in lengths,
                )
            )
    return sorted(found, key=lambda group: group.num_tokens)


def choose_modes(costs: Mapping[Group, Mapping[Measured, float]], budget_s: float) -> dict[Group, Measured]:
    """How each group runs: on a sample, from the first group on as far as the budget goes; then whole, cheapest first.

    Groups beside peers, which run nowhere else, come before other whole ones.

    Args:
        costs: predicted seconds of each way that is possible, all that it takes; whole runs are sampled as well.
        budget_s: what all of them may take, as predicted.
    """
    chosen: dict[Group, Measured] = dict.fromkeys(costs, "modelled")
    left_s = budget_s
    for mode in MODES[1:]:
        able = [group for group in costs if mode in costs[group]]

        def more_s(group: Group, mode: Measured = mode) -> float:
            before = chosen[group]
            return costs[group][mode] - (costs[group][before] if before != "modelled" else 0.0)

        able.sort(key=lambda group: (not group.peers, more_s(group)) if mode == "whole" else (False, 0.0))
        for group in able:
            if mode == "whole" and "sampled" in costs[group] and chosen[group] != "sampled":
                continue  # what a sample has no time for, the whole has none for either
            if (more := more_s(group)) <= left_s:
                left_s -= more
                chosen[group] = mode
    return chosen
