"""How many replicas a pool wants, from what its load would need over time. No clock, no I/O, no cluster.

A pool's load is told as its *demand*: the replicas, with a fraction, that would carry it at the pool's target.
`prefill_demand` and `decode_demand` make it of what can be seen; `PoolScaler` makes wanted replicas of it:

- Up, as soon as the mean demand of the last `up_s` is above what is wanted, to that mean, rounded up.
- Down, where for `down_s` every such mean would have fitted into `DOWN_SHARE` of fewer replicas, to so many.

Between `DOWN_SHARE * (n - 1)` and n replicas' worth of demand, n stays. So no load that stands still moves the number
up and down, no fall comes within `down_s` of a rise, and a load must grow by a quarter before more are wanted again.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

DOWN_SHARE = 0.8
"""Of what replicas can carry at their target, what those that stay may be left with."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLimits:
    """Between what, and how fast.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    min_replicas: int
    max_replicas: int
    up_s: float = 30.0
    """Look-back for more: a demand that lasts for less counts for less."""
    down_s: float = 600.0
    """Look-back for fewer."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} must be at least min_replicas={self.min_replicas}, that at least 1"
            )
        if not 0 < self.up_s <= self.down_s:
            raise ValueError(f"down_s={self.down_s:g} must be at least up_s={self.up_s:g}, and that above 0")


def prefill_demand(*, queued_s: float, num_prompts: int, num_busy: float, target_queue_s: float) -> float:
    """Replicas that the prompts of a prefill pool would need.

    The queue asks for more replicas, and engines that work hold those that are there: a pool that is large enough has
    no queue, and would be made smaller for it.

    Args:
        queued_s: engine time of all prompts that is still to come, on prefill nodes and in line for one.
        num_prompts: how many these are; one prompt uses one engine, however long it is.
        num_busy: engines that have worked since the last look, on average.
        target_queue_s: engine time that may be to come on each replica.
    """
    return max(min(queued_s / target_queue_s, num_prompts), num_busy)


def decode_demand(
    *, num_pages: float, pages_per_replica: int, num_requests: float, places_per_replica: int, target_use: float
) -> float:
    """Replicas that the requests of a decode pool would need: by pages or by places in the batch, whichever is more.

    Args:
        num_pages: reserved, and waited for.
        pages_per_replica: of the KV pool.
        num_requests: which decode, prefill, or wait for pages or for a decode node. What a request holds and waits for
            only since its prompt stands in line for a prefill node should not be among either.
        places_per_replica: answers that a step advances.
        target_use: share of both that a replica should have in use.
    """
    return max(num_pages / pages_per_replica, num_requests / places_per_replica) / target_use


@dataclass(frozen=True, slots=True)
class _Seen:
    """A demand, and the time that it stands for: since the one before."""

    since_s: float
    at_s: float
    demand: float
    is_whole: bool
    """No replica was lost then."""


class PoolScaler:
    """Wanted replicas of one pool. Tell it each look, in order of time: `wanted = scaler.observe(...)`.

    A replica that is lost is no load: where fewer are present than have been, what is seen does not scale up. Whoever
    replaces it is not asked here.

    Args:
        limits: of the pool.
        now_s: when the first look's time begins, on any clock.
        num_wanted: that are wanted at present; None for the least.
    """

    def __init__(self, limits: ScalingLimits, now_s: float, num_wanted: int | None = None) -> None:
        self.limits = limits
        wanted = limits.min_replicas if num_wanted is None else num_wanted
        self.num_wanted = min(max(wanted, limits.min_replicas), limits.max_replicas)
        self.demand = 0.0
        """Mean of the last `up_s`, lost replicas or not."""
        self._began_s = now_s
        self._num_reached = 0
        """Of those that are wanted, how many have been present."""
        self._seen: deque[_Seen] = deque()
        self._fitting: deque[tuple[float, int]] = deque()
        """(time, replicas into whose share the mean fitted): falling, so that the first is the most of `down_s`."""

    def observe(self, now_s: float, *, demand: float, num_present: int) -> int:
        """Note what is seen, and return the replicas that are wanted now.

        Args:
            now_s: no earlier than the last one; what has not been seen before the first look counts as no demand.
            demand: of `prefill_demand` or `decode_demand`; stands for the time since the last look.
            num_present: replicas that serve.
        """
        limits = self.limits
        self._num_reached = min(self.num_wanted, max(self._num_reached, num_present))
        since_s = self._seen[-1].at_s if self._seen else self._began_s
        self._seen.append(_Seen(since_s, now_s, demand, is_whole=num_present >= self._num_reached))
        while self._seen[0].at_s <= now_s - limits.up_s:
            self._seen.popleft()
        self.demand = self._mean(now_s, self._seen)
        risen = self._mean(now_s, (each for each in self._seen if each.is_whole))
        self._note_fitting(now_s)
        wanted = self.num_wanted
        if risen > wanted:
            wanted = math.ceil(risen - _ROUNDING)
        elif now_s - self._began_s >= limits.down_s:
            wanted = min(wanted, self._fitting[0][1])
        self.num_wanted = min(max(wanted, limits.min_replicas), limits.max_replicas)
        return self.num_wanted

    def _mean(self, now_s: float, seen: Iterable[_Seen]) -> float:
        begins_s = now_s - self.limits.up_s
        return sum(each.demand * (each.at_s - max(each.since_s, begins_s)) for each in seen) / self.limits.up_s

    def _note_fitting(self, now_s: float) -> None:
        fitting = math.ceil(self.demand / DOWN_SHARE - _ROUNDING)
        while self._fitting and self._fitting[-1][1] <= fitting:
            self._fitting.pop()
        self._fitting.append((now_s, fitting))
        while self._fitting[0][0] < now_s - self.limits.down_s:
            self._fitting.popleft()
