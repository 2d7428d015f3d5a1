"""The registry lists a node as long as it reports."""

from dataclasses import replace

from cluster.node_registry import NodeRegistry
from colm.nodes import REPORT_INTERVAL_S, NodeCounts, NodeReport, ProcessFacts, Role
from tests.clock import FakeClock


def report(replica_id: str, role: Role = Role.DECODE, num_active_requests: int = 0) -> NodeReport:
    return NodeReport(
        role=role,
        replica_id=replica_id,
        ray_node_id="machine",
        address="127.0.0.1:1",
        num_active_requests=num_active_requests,
        num_queued_requests=0,
        num_leases=0,
        process=ProcessFacts(pid=1, host="here", resident_bytes=0),
    )


def test_a_node_is_known_by_its_last_report_and_its_age() -> None:
    clock = FakeClock()
    registry = NodeRegistry(clock)
    registry.report(report("a", num_active_requests=1))
    registry.report(report("a", num_active_requests=2))
    clock.now_s += 1.5
    (node,) = registry.nodes()
    assert (node.report.num_active_requests, node.age_s) == (2, 1.5)


def test_a_silent_node_is_forgotten() -> None:
    clock = FakeClock()
    registry = NodeRegistry(clock)
    registry.report(report("a"))
    clock.now_s += 100 * REPORT_INTERVAL_S
    assert registry.nodes() == []


def test_a_node_that_missed_two_reports_is_still_believed() -> None:
    clock = FakeClock()
    registry = NodeRegistry(clock)
    registry.report(report("a"))
    clock.now_s += 3 * REPORT_INTERVAL_S
    assert len(registry.nodes()) == 1


def test_a_node_that_speaks_again_is_back() -> None:
    clock = FakeClock()
    registry = NodeRegistry(clock)
    registry.report(report("a"))
    clock.now_s += 100 * REPORT_INTERVAL_S
    assert registry.nodes() == []
    registry.report(report("a"))
    assert [node.age_s for node in registry.nodes()] == [0.0]


def test_nodes_are_counted_by_role_and_variant_as_they_are_listed() -> None:
    """Of those that report again, that come back as something else, and that are silent."""
    clock = FakeClock()
    registry = NodeRegistry(clock)
    legal = registry.serving("legal")

    def counts() -> tuple[int, ...]:
        for known in (registry, legal):
            for role in Role:
                assert known.count(role) == sum(each.report.role is role for each in known.nodes())
        return (*map(registry.count, Role), *map(legal.count, Role))

    for name, role, variant in (("p", Role.PREFILL, ""), ("a", Role.DECODE, ""), ("b", Role.DECODE, "legal")):
        registry.report(replace(report(name, role), variant=variant))
        registry.report(replace(report(name, role), variant=variant))
    assert counts() == (1, 2, 1, 1)
    clock.now_s += 6 * REPORT_INTERVAL_S
    registry.report(replace(report("a"), variant="legal"))
    assert counts() == (1, 2, 1, 2)
    clock.now_s += 6 * REPORT_INTERVAL_S
    assert counts() == (0, 1, 0, 1)


def test_each_node_expires_on_its_own() -> None:
    clock = FakeClock()
    registry = NodeRegistry(clock)
    registry.report(report("old"))
    clock.now_s += 6 * REPORT_INTERVAL_S
    registry.report(report("new"))
    clock.now_s += 6 * REPORT_INTERVAL_S
    assert [node.report.replica_id for node in registry.nodes()] == ["new"]


def test_prefill_nodes_come_first_and_the_order_is_stable() -> None:
    registry = NodeRegistry(FakeClock())
    for replica_id, role in (("d", Role.DECODE), ("b", Role.PREFILL), ("c", Role.DECODE), ("a", Role.PREFILL)):
        registry.report(replace(report(replica_id), role=role))
    assert [node.report.replica_id for node in registry.nodes()] == ["a", "b", "c", "d"]


def test_nodes_are_counted_by_role() -> None:
    registry = NodeRegistry(FakeClock())
    for name, role in (("a", Role.DECODE), ("b", Role.DECODE), ("c", Role.PREFILL)):
        registry.report(report(name, role))
    assert (registry.count(Role.DECODE), registry.count(Role.PREFILL)) == (2, 1)


def test_how_many_nodes_there_are_is_said_once_each_has_had_time_to_report() -> None:
    """A gateway that has just begun knows of few, and whoever believed that would take one node for all."""
    clock = FakeClock()
    registry = NodeRegistry(clock)
    registry.report(report("p", Role.PREFILL))
    assert registry.counts() is None
    clock.now_s += 5
    for each in (report("p", Role.PREFILL), report("d", Role.DECODE), report("e", Role.DECODE)):
        registry.report(each)
    assert registry.counts() == NodeCounts(num_prefill=1, num_decode=2)
