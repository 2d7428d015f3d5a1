"""Looks at the pools and has Ray Serve run as many replicas as each wants. One for each cluster, in the gateway."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cluster.autoscaling.policy import PoolScaler
from cluster.autoscaling.signals import PoolScaling, Signal, signal_of
from cluster.node_registry import NodeRegistry
from colm.clock import Clock
from colm.errors import ClusterError
from colm.nodes import PoolStatus, pool_name

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""From one look to the next."""
_AGAIN_S = 60.0
"""After which Serve is told a number again, whatever else may have changed it."""


class ReplicaNumbers(Protocol):
    """How many replicas run, as whoever runs them is told."""

    async def now(self) -> Mapping[str, int]:
        """The numbers that were told last, by pool.

        Raises:
            ClusterError: there is no answer.
        """

    async def tell(self, pool: str, num_replicas: int) -> None:
        """Run so many of a pool.

        Raises:
            ClusterError: there is no answer.
        """


class _Pool:
    def __init__(self, scaling: PoolScaling, scaler: PoolScaler, signal: Signal) -> None:
        self.scaling = scaling
        self.scaler = scaler
        self.signal = signal
        self.told: int | None = None
        self.told_s = 0.0


class Autoscaler:
    """Scales pools until cancelled. Lives on one event loop.

    What it knows begins with it: a new one keeps the numbers that run for the look-back at least.

    Args:
        scalings: of the pools that are scaled.
        registry: has the nodes' reports, and is given the pools' state for whoever asks.
        numbers: runs the replicas.
        clock: times the looks.
        num_waiting: requests that wait for a decode node, by variant.
    """

    def __init__(
        self,
        scalings: Sequence[PoolScaling],
        registry: NodeRegistry,
        numbers: ReplicaNumbers,
        clock: Clock,
        num_waiting: Callable[[str], int],
    ) -> None:
        self._scalings = scalings
        self._num_waiting = num_waiting
        self._registry = registry
        self._numbers = numbers
        self._clock = clock
        self._pools: list[_Pool] | None = None

    async def run(self) -> None:
        """Look every `LOOK_S` seconds, until cancelled."""
        complaint = ""
        while True:
            try:
                await self.look()
                complaint = ""
            except ClusterError as err:
                if str(err) != complaint:
                    logger.warning("pool.not_scaled cause=%s", err)
                complaint = str(err)
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Look once, and tell what has changed.

        Raises:
            ClusterError: whoever runs the replicas gives no answer; the next look tries again.
        """
        if self._pools is None:
            numbers, now_s = await self._numbers.now(), self._clock.now()
            self._pools = [
                _Pool(
                    each,
                    PoolScaler(each.limits, now_s, numbers.get(each.name)),
                    signal_of(each, self._num_waiting),
                )
                for each in self._scalings
            ]
            return
        now_s, reports = self._clock.now(), [node.report for node in self._registry.nodes()]
        states = []
        for pool in self._pools:
            load, scaler, scaling = pool.signal.look(reports, now_s), pool.scaler, pool.scaling
            num_present = sum(pool_name(report.role, report.variant) == scaling.name for report in reports)
            before = scaler.num_wanted
            wanted = scaler.observe(now_s, demand=load.demand, num_present=num_present)
            if wanted != before:
                logger.info(
                    "pool.scaled pool=%s from=%d to=%d present=%d demand=%.2f queued_s=%.1f",
                    scaling.name,
                    before,
                    wanted,
                    num_present,
                    scaler.demand,
                    load.queued_s,
                )
            states.append(
                PoolStatus(
                    role=scaling.role,
                    variant=scaling.variant,
                    num_present=num_present,
                    num_wanted=wanted,
                    min_replicas=scaler.limits.min_replicas,
                    max_replicas=scaler.limits.max_replicas,
                    demand=scaler.demand,
                    queued_s=load.queued_s,
                )
            )
        self._registry.pools = tuple(states)
        for pool in self._pools:
            await self._tell(pool, now_s)

    async def _tell(self, pool: _Pool, now_s: float) -> None:
        wanted = pool.scaler.num_wanted
        if wanted != pool.told or now_s - pool.told_s >= _AGAIN_S:
            await self._numbers.tell(pool.scaling.name, wanted)
            pool.told, pool.told_s = wanted, now_s
