"""Replicas of a Serve deployment, lent in order of asking."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from colm.errors import PeerUnavailable
from colm.line import BEAT_INTERVAL_S, Beat, Line
from colm.nodes import Role

logger = logging.getLogger(__name__)

LEASE_TTL_S = 30.0
"""How long a replica keeps a lease for a stream that does not come."""
_BEATS_PER_GRANT = 5


class ServeLender:
    """Replicas of one Serve deployment, lent in the order of asking. Lives on one event loop.

    Serve chooses the replica, among those that take one more call, and waits for one where all are busy or gone. Only
    the first in line asks it: so everybody has a place that can be told, and nobody is bound to a busy replica while
    another one becomes free.

    Args:
        handle: of the deployment.
        role: of its replicas, for messages.
        max_waiting: who comes when so many wait is refused.
    """

    def __init__(self, handle: Any, role: Role, *, max_waiting: int) -> None:
        self._handle = handle
        self._role = role
        self._line = Line(f"a {role.value} node", max_waiting=max_waiting)
        self._somebody_asks = False

    @asynccontextmanager
    async def lease(self, beat: Beat) -> AsyncIterator[tuple[str, str]]:
        """Hold a replica's `lease` call open; yields (address, lease id).

        Raises:
            PeerUnavailable: the replica died before it answered.
            CapacityExceeded: too many wait already.
        """
        await self._line.turn(self._take_the_word, beat)
        try:
            grants, granted = await self._ask(beat)
        finally:
            self._somebody_asks = False
            self._line.look_again()
        try:
            yield granted
        finally:
            grants.cancel()

    def _take_the_word(self) -> bool | None:
        if self._somebody_asks:
            return None
        self._somebody_asks = True
        return True

    async def _ask(self, beat: Beat) -> tuple[Any, tuple[str, str]]:
        while True:
            grants = self._handle.options(stream=True).lease.remote()
            granted = asyncio.ensure_future(anext(grants))
            granted.add_done_callback(lambda task: task.cancelled() or task.exception())
            try:
                for _ in range(_BEATS_PER_GRANT):
                    await asyncio.wait([granted], timeout=BEAT_INTERVAL_S)
                    if granted.done():
                        return grants, granted.result()
                    await beat(0)
            except (RayError, RayServeException) as err:
                raise PeerUnavailable(f"no {self._role.value} node answered: {err}") from err
            finally:
                if not granted.done() or granted.cancelled() or granted.exception() is not None:
                    granted.cancel()
                    grants.cancel()
            # Serve may have handed the call to a replica that was stopped a moment ago and will never answer.
            logger.info("lease.asked_again role=%s", self._role.value)
