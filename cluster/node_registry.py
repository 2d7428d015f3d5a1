"""The nodes of the cluster: those that reported lately."""

from colm.clock import Clock
from colm.nodes import REPORT_INTERVAL_S, NodeCounts, NodeReport, NodeStatus, PoolStatus, Role

_EXPIRES_S = 10 * REPORT_INTERVAL_S


class NodeRegistry:
    """Keeps each node's last report, for 10 report intervals."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.now()
        self._seen: dict[str, tuple[NodeReport, float]] = {}
        self.pools: tuple[PoolStatus, ...] = ()
        """Those whose size follows their load, as their scaler sees them."""

    def report(self, report: NodeReport) -> None:
        """Store a node's report in place of its last one."""
        self._seen[report.replica_id] = (report, self._clock.now())

    def nodes(self) -> list[NodeStatus]:
        """Nodes that reported lately, prefill nodes first."""
        now = self._clock.now()
        self._seen = {key: seen for key, seen in self._seen.items() if now - seen[1] < _EXPIRES_S}
        nodes = [NodeStatus(report=report, age_s=now - at_s) for report, at_s in self._seen.values()]
        return sorted(nodes, key=lambda node: (node.report.role.value != "prefill", node.report.replica_id))

    def count(self, role: Role) -> int:
        """Number of nodes of a role that reported lately."""
        return sum(node.report.role is role for node in self.nodes())

    def counts(self) -> NodeCounts | None:
        """How many nodes there are; None until each has had time to report."""
        if self._clock.now() - self._began_s < _EXPIRES_S:
            return None
        return NodeCounts(num_prefill=self.count(Role.PREFILL), num_decode=self.count(Role.DECODE))

    def serving(self, variant: str) -> "NodeRegistry":
        """What is known of the nodes of one model: its decode nodes, and the prefill nodes of all.

        Args:
            variant: its name; empty for the cluster's own.
        """
        return _Serving(self, variant)


class _Serving(NodeRegistry):
    def __init__(self, all_nodes: NodeRegistry, variant: str) -> None:
        self._all_nodes = all_nodes
        self._variant = variant

    def report(self, report: NodeReport) -> None:
        self._all_nodes.report(report)

    def nodes(self) -> list[NodeStatus]:
        nodes = self._all_nodes.nodes()
        return [node for node in nodes if node.report.role is Role.PREFILL or node.report.variant == self._variant]
