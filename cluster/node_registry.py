"""The nodes of the cluster: those that reported lately."""

from collections import Counter, OrderedDict

from colm.clock import Clock
from colm.nodes import REPORT_INTERVAL_S, NodeCounts, NodeReport, NodeStatus, PoolStatus, Role

_EXPIRES_S = 10 * REPORT_INTERVAL_S


class NodeRegistry:
    """Keeps each node's last report, for 10 report intervals."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.now()
        self._seen = OrderedDict[str, tuple[NodeReport, float]]()
        """The one that was heard last at the end."""
        self._num = Counter[tuple[Role, str]]()
        """Of those, by role and variant: each request asks how many there are."""
        self.pools: tuple[PoolStatus, ...] = ()
        """Those whose size follows their load, as their scaler sees them."""

    def report(self, report: NodeReport) -> None:
        """Store a node's report in place of its last one."""
        if report.replica_id in self._seen:
            self._forget(report.replica_id)
        self._seen[report.replica_id] = (report, self._clock.now())
        self._num[report.role, report.variant] += 1

    def nodes(self) -> list[NodeStatus]:
        """Nodes that reported lately, prefill nodes first."""
        now = self._forget_the_silent()
        nodes = [NodeStatus(report=report, age_s=now - at_s) for report, at_s in self._seen.values()]
        return sorted(nodes, key=lambda node: (node.report.role.value != "prefill", node.report.replica_id))

    def count(self, role: Role, variant: str | None = None) -> int:
        """Number of nodes of a role that reported lately: of one variant, or None of all."""
        self._forget_the_silent()
        if variant is not None:
            return self._num[role, variant]
        return sum(num for (each, _), num in self._num.items() if each is role)

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

    def _forget_the_silent(self) -> float:
        """Forget nodes that did not report lately; the time is returned."""
        now = self._clock.now()
        while self._seen and now - next(iter(self._seen.values()))[1] >= _EXPIRES_S:
            self._forget(next(iter(self._seen)))
        return now

    def _forget(self, replica_id: str) -> None:
        report, _ = self._seen.pop(replica_id)
        self._num[report.role, report.variant] -= 1


class _Serving(NodeRegistry):
    def __init__(self, all_nodes: NodeRegistry, variant: str) -> None:
        self._all_nodes = all_nodes
        self._variant = variant

    def report(self, report: NodeReport) -> None:
        self._all_nodes.report(report)

    def nodes(self) -> list[NodeStatus]:
        nodes = self._all_nodes.nodes()
        return [node for node in nodes if node.report.role is Role.PREFILL or node.report.variant == self._variant]

    def count(self, role: Role, variant: str | None = None) -> int:
        if variant is None and role is Role.DECODE:
            variant = self._variant
        return self._all_nodes.count(role, variant)
