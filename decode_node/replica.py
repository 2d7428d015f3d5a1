"""A decode node as a Ray Serve replica: placed, scaled, health-checked and restarted by Serve."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from colm.errors import CapacityExceeded, PeerUnavailable
from colm.leases import LeaseTable
from colm.nodes import NodeReport, ProcessFacts, Role, keep_reporting, log_beside
from colm.wire.security import Security
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import PrefillLease

LEASE_TTL_S = 30.0


@asynccontextmanager
async def borrow(handle: Any, role: str) -> AsyncIterator[tuple[str, str]]:
    """Hold a replica's `lease` call open; yields (address, lease id).

    Ray Serve chooses the replica, and waits for one where all are busy or gone.

    Raises:
        PeerUnavailable: the replica died before it answered.
        CapacityExceeded: too many calls wait already.
    """
    grants = handle.options(stream=True).lease.remote()
    try:
        try:
            granted = await anext(grants)
        except BackPressureError as err:
            raise CapacityExceeded(f"too many requests wait for a {role} node; try again later") from err
        except (RayError, RayServeException) as err:
            raise PeerUnavailable(f"no {role} node answered: {err}") from err
        yield granted
    finally:
        grants.cancel()


class ServePrefillPool:
    """Prefill nodes as Ray Serve knows them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @asynccontextmanager
    async def lease(self, *, num_tokens: int) -> AsyncIterator[PrefillLease]:  # noqa: ARG002 - the pool's contract
        """Borrow a node from Serve."""
        async with borrow(self._handle, Role.PREFILL.value) as (address, lease_id):
            yield PrefillLease(address=address, lease_id=lease_id)


class DecodeReplica:
    """Shell around `DecodeNode`.

    Args:
        options: host is replaced by this machine's address.
        prefill: handle of the prefill deployment.
        gateway: (deployment, application) that wants to know how this node is.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, options: DecodeOptions, security: Security, prefill: Any, gateway: tuple[str, str]
    ) -> None:
        log_beside("ray.serve")
        self._leases = LeaseTable(LEASE_TTL_S)
        here = replace(options, host=ray.util.get_node_ip_address())
        self._node = DecodeNode(here, security, ServePrefillPool(prefill), self._leases)
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
