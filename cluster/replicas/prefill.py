"""A prefill node as a Ray Serve replica."""

from dataclasses import replace

from cluster.replicas.node import NodeReplica
from cluster.security.secret_files import SecretFiles
from colm.nodes import NodeLoad, NodeReport, Role
from colm.tracing import TraceFiles
from colm.wire.members import Member
from prefill_node.node import PrefillNode, PrefillOptions


class PrefillReplica(NodeReplica):
    """Runs a `PrefillNode` as a Serve replica.

    Args:
        options: host is replaced by this machine's address.
        gateway: (deployment, application) to which this node reports.
        metrics_host: where Prometheus reads its metrics; None for nowhere.
        traces: where it records spans; None for nowhere.
    """

    role = Role.PREFILL

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        options: PrefillOptions,
        secrets: SecretFiles,
        gateway: tuple[str, str],
        metrics_host: str | None,
        traces: TraceFiles | None,
    ) -> None:
        super().__init__()
        security = secrets.of_nodes(Member.PREFILL)
        self._node = PrefillNode(replace(options, host=self._host), security, self._leases)
        await self._start(self._node, secrets, gateway, metrics_host, traces)

    def _report(self) -> NodeReport:
        load = self._node.service.load
        told = NodeLoad(work_s=load.remaining_s, engine_s=load.engine_s, prompt_cost=load.prompt_cost)
        return self._reported(told, num_active=load.num_active, num_queued=load.num_queued)
