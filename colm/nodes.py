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


def pool_name(role: Role, variant: str = "") -> str:
    """The name of all nodes that serve the same: the prefill pool's, or that of one model's decode pool.

    Args:
        role: of its nodes.
        variant: as `NodeReport` has it.
    """
    return f"{role.value}-{variant}" if variant else role.value


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
class PromptCost:
    """Engine time of whole prompts, as a prefill node estimates it from their length."""

    token_s: float
    """For each token."""
    pair_s: float
    """For each pair of tokens: what attention adds, by the square of the length."""

    def seconds(self, num_tokens: int) -> float:
        """Of a prompt of that length, dense and with nothing kept of it."""
        return self.token_s * num_tokens + self.pair_s * num_tokens**2


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLoad:
    """What says how many nodes of its role there should be; told to the gateway alone."""

    work_s: float = 0.0
    """Of a prefill node: engine time of its prompts that is still to come, as estimated."""
    engine_s: float = 0.0
    """Of a prefill node: time in which its engine has worked since it began."""
    prompt_cost: PromptCost | None = None
    """Of a prefill node."""
    waiting_tokens: tuple[int, ...] = ()
    """Of a decode node: lengths of the prompts that wait there for a prefill node."""
    num_prefilling: int = 0
    """Of a decode node: requests whose prompts are computed elsewhere, or wait for that; of those that are queued."""
    num_pages_prefilling: int = 0
    """Of a decode node: pages that these hold."""
    num_pages_wanted: int = 0
    """Of a decode node: pages that requests wait for."""
    num_places: int = 0
    """Of a decode node: answers that a step advances."""


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
    variant: str = ""
    """Which of the cluster's further models a decode node serves; empty for the model itself, and of prefill nodes."""
    process: ProcessFacts
    load: NodeLoad = NodeLoad()


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCounts:
    """How many nodes serve, as the gateway answers to a report."""

    num_prefill: int
    num_decode: int
    """Of all models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeStatus:
    """A node's last report."""

    report: NodeReport
    age_s: float
    """Seconds since the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatus:
    """A pool whose size follows its load."""

    role: Role
    variant: str = ""
    """Of which further model, as `NodeReport` has it."""
    num_present: int
    num_wanted: int
    min_replicas: int
    max_replicas: int
    demand: float
    """Replicas that would carry its load at its target: the mean of the look-back."""
    queued_s: float
    """Engine time of the prompts on prefill nodes and in line for one, as estimated; 0 for decode nodes."""

    @property
    def name(self) -> str:
        """As `pool_name` makes it."""
        return pool_name(self.role, self.variant)


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
    """The one that requests without a name get comes first."""
    nodes: tuple[NodeStatus, ...]
    num_active_requests: int
    """Requests inside the gateway."""
    metrics_address: str = ""
    """host:port at which Prometheus reads the gateway's metrics, and /targets; empty where it does not."""
    pools: tuple[PoolStatus, ...] = ()
    """Those whose size follows their load."""

    def model_of(self, report: NodeReport) -> str:
        """Name of the model that a decode node serves; empty of other nodes, and where nothing is served."""
        own = self.models[0].name if self.models else ""
        return (report.variant or own) if report.role is Role.DECODE else ""

    def without_places(self) -> "ClusterStatus":
        """The same without what only an operator needs: addresses, processes and names of machines."""
        return replace(self, metrics_address="", nodes=tuple(map(_without_place, self.nodes)))


def _without_place(node: NodeStatus) -> NodeStatus:
    process = replace(node.report.process, pid=0, host="")
    return replace(node, report=replace(node.report, address="", metrics_address="", ray_node_id="", process=process))
