"""What every node tells the gateway about itself."""

import os
import socket
from dataclasses import dataclass, replace
from enum import Enum

import psutil

REPORT_INTERVAL_S = 0.5


class Role(Enum):
    """What a node does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessFacts:
    """The process behind a node."""

    pid: int
    host: str
    resident_bytes: int

    @classmethod
    def now(cls) -> "ProcessFacts":
        """This process."""
        resident_bytes = psutil.Process().memory_info().rss
        return cls(pid=os.getpid(), host=socket.gethostname(), resident_bytes=resident_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """One node's state, as the node reports it."""

    role: Role
    replica_id: str
    ray_node_id: str
    """The machine, as Ray names it."""
    address: str
    """host:port of its gRPC server."""
    metrics_address: str = ""
    """host:port at which Prometheus reads its metrics; empty where it does not."""
    num_active_requests: int
    num_queued_requests: int
    num_leases: int
    """Leases granted and not yet ended."""
    num_pages_total: int = 0
    """Pages of the KV pool, on decode nodes."""
    num_pages_used: int = 0
    process: ProcessFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeStatus:
    """A node's last report."""

    report: NodeReport
    age_s: float
    """Seconds since the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStatus:
    """A model that the cluster serves."""

    name: str
    chains: tuple[int, ...]
    max_context_tokens: int
    fingerprint: str
    """`colm.kv.fingerprint` of what its nodes serve."""
    reads_text: bool
    """False where it takes token ids only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStatus:
    """A cluster, as its gateway sees it."""

    models: tuple[ModelStatus, ...]
    nodes: tuple[NodeStatus, ...]
    num_active_requests: int
    """Requests inside the gateway."""
    metrics_address: str = ""
    """host:port at which Prometheus reads the gateway's metrics, and /targets; empty where it does not."""

    def without_places(self) -> "ClusterStatus":
        """The same without what only an operator needs: addresses, processes and names of machines."""
        return replace(self, metrics_address="", nodes=tuple(map(_without_place, self.nodes)))


def _without_place(node: NodeStatus) -> NodeStatus:
    process = replace(node.report.process, pid=0, host="")
    return replace(node, report=replace(node.report, address="", metrics_address="", ray_node_id="", process=process))
