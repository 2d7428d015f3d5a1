"""What prefill and decode nodes have in common as Ray Serve replicas: placed, health-checked and restarted by Serve."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import ray
from ray import serve

from cluster.replicas.leaving import Leaving
from cluster.replicas.lender import LEASE_TTL_S
from cluster.replicas.reporting import keep_reporting, log_beside
from cluster.replicas.serve_port import keep_serve_port_shut
from cluster.security.certificates import keep_looking_after
from cluster.security.secret_files import SecretFiles
from colm.leases import LeaseTable
from colm.metrics.endpoint import MetricsEndpoint
from colm.node_cli import Node
from colm.nodes import NodeCounts, NodeLoad, NodeReport, ProcessFacts, Role
from colm.tracing import TraceFiles, trace_to
from colm.wire.endpoint import is_loopback


class NodeReplica:
    """Starts a node, leases it, reports on it, and stops it. A role's replica makes its node and calls `_start`."""

    role: ClassVar[Role]
    variant = ""
    """Which further model a decode replica serves."""
    _running: Node | None = None
    _metrics: MetricsEndpoint | None = None
    _end_traces: Callable[[], None] | None = None

    def __init__(self) -> None:
        log_beside("ray.serve")
        keep_serve_port_shut()
        self._leaving = Leaving()
        self._leases = LeaseTable(LEASE_TTL_S)
        self._host: str = ray.util.get_node_ip_address()
        """This machine's address."""

    async def _start(
        self,
        node: Node,
        secrets: SecretFiles,
        gateway: tuple[str, str],
        metrics_host: str | None,
        traces: TraceFiles | None,
    ) -> None:
        """Start the node, look after its certificates, and report on it to the gateway, a (deployment, application).

        Metrics are served on the loopback, or on this machine's own address where the host is another one.
        """
        if traces is not None:
            self._end_traces = trace_to(traces, self.role.value)
        await node.start()
        self._running = node
        if metrics_host is not None:
            host = metrics_host if is_loopback(metrics_host) else self._host
            self._metrics = MetricsEndpoint(node.metrics, host=host, port=0, is_alive=lambda: node.is_healthy)
            await self._metrics.start()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        handle: Any = serve.get_deployment_handle(*gateway)
        self._reporting = asyncio.create_task(keep_reporting(handle.report.remote, self._report, self._hear))
        self._looking_after = asyncio.create_task(keep_looking_after(secrets))

    async def lease(self, again: bool) -> AsyncIterator[tuple[str, str]]:
        """Grant a lease for one stream: yields (address, lease id); with `again`, another one after each.

        The call stays open until the stream has ended, so that Serve counts it as load.
        """
        assert self._running is not None
        async for grant in self._leases.offer(self._running.address, again=again):
            yield grant

    async def check_health(self) -> None:
        """Serve calls it once a second, and replaces this replica when it has raised three times in a row."""
        self._leaving.check()
        if self._running is not None and not self._running.is_healthy:
            raise RuntimeError(f"the {self.role.value} node's loop has ended, or its work has stood still for a minute")

    async def __del__(self) -> None:
        if self._running is not None:
            self._reporting.cancel()
            if self._metrics is not None:
                await self._metrics.stop()
            self._looking_after.cancel()
            await self._running.stop()
        if self._end_traces is not None:
            self._end_traces()

    def _hear(self, counts: NodeCounts) -> None:
        """Take the gateway's answer to a report."""

    @abstractmethod
    def _report(self) -> NodeReport:
        """The node's state, by `_reported`."""

    def _reported(
        self, load: NodeLoad, *, num_active: int, num_queued: int, num_pages_total: int = 0, num_pages_used: int = 0
    ) -> NodeReport:
        assert self._running is not None
        return NodeReport(
            role=self.role,
            replica_id=self._replica_id,
            ray_node_id=ray.get_runtime_context().get_node_id(),
            address=self._running.address,
            metrics_address="" if self._metrics is None else self._metrics.address,
            num_active_requests=num_active,
            num_queued_requests=num_queued,
            num_leases=len(self._leases),
            num_pages_total=num_pages_total,
            num_pages_used=num_pages_used,
            variant=self.variant,
            process=ProcessFacts.now(),
            load=load,
        )
