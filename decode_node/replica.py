"""A decode node as a Ray Serve replica: placed, scaled, health-checked and restarted by Serve."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from colm.errors import PeerUnavailable
from colm.leases import LeaseTable
from colm.line import BEAT_INTERVAL_S, Beat, Line
from colm.nodes import NodeReport, ProcessFacts, Role, keep_reporting, log_beside
from colm.wire.security import Security
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import PrefillLease

logger = logging.getLogger(__name__)

LEASE_TTL_S = 30.0
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


class ServePrefillPool:
    """Prefill nodes as Ray Serve knows them."""

    def __init__(self, handle: Any, *, max_waiting: int) -> None:
        self._lender = ServeLender(handle, Role.PREFILL, max_waiting=max_waiting)

    @asynccontextmanager
    async def lease(self, *, num_tokens: int, beat: Beat) -> AsyncIterator[PrefillLease]:  # noqa: ARG002 - the pool's contract
        """Borrow a node from Serve."""
        async with self._lender.lease(beat) as (address, lease_id):
            yield PrefillLease(address=address, lease_id=lease_id)


class DecodeReplica:
    """Shell around `DecodeNode`.

    Args:
        options: host is replaced by this machine's address.
        prefill: handle of the prefill deployment.
        max_waiting_for_prefill: prompts of this node that may wait for a prefill node.
        gateway: (deployment, application) that wants to know how this node is.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        options: DecodeOptions,
        security: Security,
        prefill: Any,
        max_waiting_for_prefill: int,
        gateway: tuple[str, str],
    ) -> None:
        log_beside("ray.serve")
        self._leases = LeaseTable(LEASE_TTL_S)
        here = replace(options, host=ray.util.get_node_ip_address())
        pool = ServePrefillPool(prefill, max_waiting=max_waiting_for_prefill)
        self._node = DecodeNode(here, security, pool, self._leases)
        await self._node.start()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        handle: Any = serve.get_deployment_handle(*gateway)
        self._reporting = asyncio.create_task(keep_reporting(handle.report.remote, self._report))

    async def lease(self) -> AsyncIterator[tuple[str, str]]:
        """Promise to serve one request: (address, lease id).

        The call stays open until the request has ended, so that Serve sees the work.
        """
        async for grant in self._leases.offer(self._node.address):
            yield grant

    async def check_health(self) -> None:
        """Tell Serve to replace this replica once its decode loop has died."""
        if not self._node.is_healthy:
            raise RuntimeError("the decode loop has ended")

    async def __del__(self) -> None:
        if (reporting := getattr(self, "_reporting", None)) is not None:
            reporting.cancel()
            await self._node.stop()

    def _report(self) -> NodeReport:
        load = self._node.load
        return NodeReport(
            role=Role.DECODE,
            replica_id=self._replica_id,
            ray_node_id=ray.get_runtime_context().get_node_id(),
            address=self._node.address,
            num_active_requests=load.num_active,
            num_queued_requests=load.num_queued,
            num_leases=len(self._leases),
            num_pages_total=load.num_pages_total,
            num_pages_used=load.num_pages_used,
            process=ProcessFacts.now(),
        )
