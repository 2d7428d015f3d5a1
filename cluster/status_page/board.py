"""A cluster's figures for all who watch it at once: one look every few seconds, and what came of those before."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.scrape import Scrape, scrape
from cluster.top import ClusterView, GatewayView, Watch
from colm.clock import Clock
from colm.nodes import ClusterStatus, ModelStatus

INTERVAL_S = 2.0
"""From one look to the next."""
_MAX_PAUSE_S = 30.0
"""After which what was seen before is forgotten: rates would be of the whole pause."""
_MAX_POINTS = 90
_MAX_ERRORS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RecentError:
    """Requests that ended alike between two looks; no text, which may quote what a client sent."""

    outcome: str
    count: int
    ago_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """All that is shown."""

    models: tuple[ModelStatus, ...]
    interval_s: float
    view: ClusterView
    history: tuple[GatewayView, ...]
    """What clients got, look by look; the last is that of `view`."""
    recent_errors: tuple[RecentError, ...]
    """The latest first."""


class Board:
    """Looks at the cluster when somebody asks, and not before. Lives on one event loop.

    Args:
        status: of the cluster, now.
        clock: says when it is time for another look.
        read: reads one process's metrics, in a thread.
    """

    def __init__(
        self, status: Callable[[], ClusterStatus], clock: Clock, read: Callable[[str], Scrape | None] = scrape
    ) -> None:
        self._status, self._clock, self._read = status, clock, read
        self._one_at_a_time = asyncio.Lock()
        self._looked_s = -_MAX_PAUSE_S
        self._forget()

    def _forget(self) -> None:
        self._now: ClusterStatus | None = None
        self._watch = Watch(self._taken, self._read)
        self._views: deque[ClusterView] = deque(maxlen=_MAX_POINTS)
        self._errors: deque[tuple[float, str, int]] = deque(maxlen=_MAX_ERRORS)

    def _taken(self) -> ClusterStatus:
        assert self._now is not None, "a look begins with a status"
        return self._now

    async def look(self) -> Shown:
        """The cluster as the last look saw it, which is never older than the interval."""
        async with self._one_at_a_time:
            if (now_s := self._clock.now()) - self._looked_s >= INTERVAL_S or self._now is None:
                if now_s - self._looked_s > _MAX_PAUSE_S:
                    self._forget()
                self._now = self._status()  # on the loop, whose it is
                view = await asyncio.to_thread(self._watch.look)
                self._looked_s = now_s
                self._views.append(view)
                self._errors.extendleft((now_s, *each) for each in view.gateway.errors)
            return Shown(
                models=self._taken().models,
                interval_s=INTERVAL_S,
                view=self._views[-1],
                history=tuple(each.gateway for each in self._views),
                recent_errors=tuple(
                    RecentError(outcome=outcome, count=count, ago_s=round(self._clock.now() - seen_s, 1))
                    for seen_s, outcome, count in self._errors
                ),
            )
