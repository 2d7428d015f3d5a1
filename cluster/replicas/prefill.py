"""A prefill node as a Ray Serve replica: placed, scaled, health-checked and restarted by Serve."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import ray
from ray import serve

from cluster.replicas.lender import LEASE_TTL_S
from cluster.replicas.reporting import keep_reporting, log_beside
from cluster.replicas.serve_port import keep_serve_port_shut
from cluster.secret_files import SecretFiles
from colm.leases import LeaseTable
from colm.nodes import NodeReport, ProcessFacts, Role
from prefill_node.node import PrefillNode, PrefillOptions


class PrefillReplica:
    """Runs a `PrefillNode` as a Serve replica.

    Args:
        options: host is replaced by this machine's address.
        gateway: (deployment, application) to which this node reports.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, options: PrefillOptions, secrets: SecretFiles, gateway: tuple[str, str]
    ) -> None:
        log_beside("ray.serve")
        keep_serve_port_shut()
        self._leases = LeaseTable(LEASE_TTL_S)
        here = replace(options, host=ray.util.get_node_ip_address())
        self._node = PrefillNode(here, secrets.of_nodes(), self._leases)
        await self._node.start()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        handle: Any = serve.get_deployment_handle(*gateway)
        self._reporting = asyncio.create_task(keep_reporting(handle.report.remote, self._report))

    async def lease(self, again: bool) -> AsyncIterator[tuple[str, str]]:
        """Grant a lease for one stream: yields (address, lease id); with `again`, another one after each.

        The call stays open until the stream has ended, so that Serve counts it as load.
        """
        async for grant in self._leases.offer(self._node.address, again=again):
            yield grant

    async def __del__(self) -> None:
        if (reporting := getattr(self, "_reporting", None)) is not None:
            reporting.cancel()
            await self._node.stop()

    def _report(self) -> NodeReport:
        load = self._node.service.load
        return NodeReport(
            role=Role.PREFILL,
            replica_id=self._replica_id,
            ray_node_id=ray.get_runtime_context().get_node_id(),
            address=self._node.address,
            num_active_requests=load.num_active,
            num_queued_requests=load.num_queued,
            num_leases=len(self._leases),
            process=ProcessFacts.now(),
        )
