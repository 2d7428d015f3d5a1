"""Pools that follow their load: the real `Autoscaler` over simulated nodes, and what it has done.

Modelled: a replica serves a fixed time after it is wanted. One that is not wanted any more takes nothing new, and ends
what it has; Ray Serve would give it some seconds, and its answers would go on elsewhere.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.autoscaling.autoscaler import LOOK_S, Autoscaler
from cluster.autoscaling.signals import PoolScaling
from cluster.node_registry import NodeRegistry
from cluster.options import DecodeSection, PrefillSection
from colm.clock import Clock
from colm.nodes import PoolStatus, Role


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingPlan:
    """Which pools follow their load, and how fast replicas come."""

    pools: tuple[PoolScaling, ...]
    start_s: float
    """From when a replica is wanted until it serves."""


def scalings(
    num_prefill: int, max_prefill: int | None, num_decode: int, max_decode: int | None
) -> tuple[PoolScaling, ...]:
    """Of the pools that may grow, as a cluster's options with these numbers describe them."""
    of_prefill = PrefillSection(replicas=num_prefill, max_replicas=max_prefill).scaling
    of_decode = DecodeSection(replicas=num_decode, max_replicas=max_decode).scaling
    return tuple(each for each in (of_prefill, of_decode) if each is not None)


@dataclass(frozen=True, slots=True)
class Look:
    """What the autoscaler saw and wanted at one moment."""

    at_s: float
    pools: tuple[PoolStatus, ...]


@dataclass(slots=True)
class SimulatedNumbers:
    """`cluster.autoscaling.autoscaler.ReplicaNumbers` of simulated pools.

    Args:
        present: replicas of a role that serve.
        add: one more of a role serves from now on.
        retire: the last one that was added takes nothing new.
        start_s: as `ScalingPlan` has it.
    """

    present: Callable[[Role], int]
    add: Callable[[Role], None]
    retire: Callable[[Role], None]
    start_s: float
    _wanted: dict[Role, int] = field(default_factory=dict)
    _num_starting: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))

    async def now(self) -> Mapping[str, int]:
        """Those that serve; asked before anything is told."""
        return {role.value: self.present(role) for role in Role}

    async def tell(self, pool: str, num_replicas: int) -> None:
        """Start what is missing; retire what is too many, at once."""
        role = Role(pool)
        self._wanted[role] = num_replicas
        while self.present(role) > num_replicas:
            self.retire(role)
        loop = asyncio.get_running_loop()
        while self.present(role) + self._num_starting[role] < num_replicas:
            self._num_starting[role] += 1
            loop.call_later(self.start_s, self._started, role)

    def _started(self, role: Role) -> None:
        self._num_starting[role] -= 1
        if self.present(role) < self._wanted[role]:
            self.add(role)


async def scale(
    plan: ScalingPlan,
    registry: NodeRegistry,
    numbers: SimulatedNumbers,
    clock: Clock,
    num_waiting: Callable[[], int],
    looks: list[Look],
) -> None:
    """Run the real autoscaler until cancelled, and note what it says at each look."""
    scaler = Autoscaler(plan.pools, registry, numbers, clock, lambda _: num_waiting())
    while True:
        await scaler.look()
        looks.append(Look(clock.now(), registry.pools))
        await asyncio.sleep(LOOK_S)


def write_plot(path: Path, looks: Sequence[Look]) -> None:
    """Draw wanted and present replicas of each pool, and what its load asks for, over time."""
    from bench.serving.plot import check_plots

    check_plots()
    from matplotlib.figure import Figure

    roles = list(dict.fromkeys(pool.role for look in looks for pool in look.pools))
    figure = Figure(figsize=(8, 2.4 * len(roles)), layout="constrained")
    for axis, role in zip(figure.subplots(len(roles), 1, squeeze=False, sharex=True)[:, 0], roles, strict=True):
        seen = [(look.at_s, pool) for look in looks for pool in look.pools if pool.role is role]
        times_s = [at_s for at_s, _ in seen]
        axis.step(times_s, [pool.demand for _, pool in seen], where="post", color="#8a8a8a", label="load asks for")
        axis.step(times_s, [pool.num_wanted for _, pool in seen], where="post", color="#b3531d", label="wanted")
        axis.step(times_s, [pool.num_present for _, pool in seen], where="post", color="#1f5fa8", label="serve")
        axis.set_ylabel(f"{role.value} replicas")
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, color="#dddddd", linewidth=0.6)
    figure.axes[0].legend(frameon=False, ncols=3, fontsize=8)
    figure.axes[-1].set_xlabel("seconds, simulated")
    figure.savefig(path, dpi=120)
