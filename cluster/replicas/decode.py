"""A decode node as a Ray Serve replica: placed, scaled, health-checked and restarted by Serve."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve

from cluster.replicas.lender import LEASE_TTL_S, ServeLender
from cluster.replicas.reporting import keep_reporting, log_beside
from cluster.replicas.serve_port import keep_serve_port_shut
from cluster.secret_files import SecretFiles
from colm.leases import LeaseTable
from colm.line import Beat
from colm.nodes import NodeReport, ProcessFacts, Role
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import PrefillLease, no_other


class ServePrefillPool:
    """Lends the prefill nodes that Ray Serve runs."""

    def __init__(self, handle: Any, *, num_replicas: int, max_waiting: int, is_alone: bool) -> None:
        self._lender = ServeLender(handle, Role.PREFILL, max_waiting=max_waiting, is_alone=is_alone)
        self._num_replicas = num_replicas

    def close(self) -> None:
        """Give back the nodes that nobody uses."""
        self._lender.close()

    @asynccontextmanager
    async def lease(
        self,
        *,
        num_tokens: int,  # noqa: ARG002 - the pool's contract
        beat: Beat,
        preferred: str | None,  # noqa: ARG002 - Serve chooses
        refused_by: Collection[str],
    ) -> AsyncIterator[PrefillLease]:
        """Borrow a node from Serve."""
        if len(refused_by) >= self._num_replicas:
            raise no_other()
        async with self._lender.lease(beat, refused_by=refused_by) as (address, lease_id):
            yield PrefillLease(address=address, lease_id=lease_id)


class DecodeReplica:
    """Runs a `DecodeNode` as a Serve replica.

    Args:
        options: host is replaced by this machine's address.
        prefill: handle of the prefill deployment.
        num_prefill: its replicas.
        max_waiting_for_prefill: prompts of this node that may wait for a prefill node.
        is_alone: there is no other decode replica.
        gateway: (deployment, application) to which this node reports.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        options: DecodeOptions,
        secrets: SecretFiles,
        prefill: Any,
        num_prefill: int,
        max_waiting_for_prefill: int,
        is_alone: bool,
        gateway: tuple[str, str],
    ) -> None:
        log_beside("ray.serve")
        keep_serve_port_shut()
        self._leases = LeaseTable(LEASE_TTL_S)
        here = replace(options, host=ray.util.get_node_ip_address())
        self._prefill_pool = ServePrefillPool(
            prefill, num_replicas=num_prefill, max_waiting=max_waiting_for_prefill, is_alone=is_alone
        )
        self._node = DecodeNode(here, secrets.of_nodes(), self._prefill_pool, self._leases)
        await self._node.start()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        handle: Any = serve.get_deployment_handle(*gateway)
        self._reporting = asyncio.create_task(keep_reporting(handle.report.remote, self._report))

    async def lease(self, again: bool) -> AsyncIterator[tuple[str, str]]:
        """Grant a lease for one request: yields (address, lease id); with `again`, another one after each.

        The call stays open until the request has ended, so that Serve counts it as load.
        """
        async for grant in self._leases.offer(self._node.address, again=again):
            yield grant

    async def check_health(self) -> None:
        """Raise once the decode loop has ended, so that Serve replaces this replica."""
        if not self._node.is_healthy:
            raise RuntimeError("the decode loop has ended")

    async def __del__(self) -> None:
        if (reporting := getattr(self, "_reporting", None)) is not None:
            reporting.cancel()
            await self._node.stop()
            self._prefill_pool.close()

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
