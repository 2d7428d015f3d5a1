"""What the gateway's replica is told when it starts."""

from dataclasses import dataclass

from cluster.autoscaling.signals import PoolScaling
from cluster.front_door.plan import GatewayLimits
from colm.tracing import TraceFiles

SUCCESSOR_S = 60.0
"""How long a gateway that leaves goes on as before, until another one listens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayOptions:
    """How to run the gateway."""

    model_path: str
    model_name: str
    dtype: str
    host: str
    port: int
    http_port: int
    max_files_bytes: int
    files_folder: str | None
    """Where files of clients are kept, also when the cluster ends; None for a folder that ends with it."""
    cluster: str
    """Its name, which gateways that take one another's place have in common."""
    limits: GatewayLimits
    audit_folder: str | None
    """None without an audit log."""
    audit_keep_days: int
    metrics_host: str | None
    """Where Prometheus reads the gateway's metrics; None for nowhere."""
    metrics_port: int
    traces: TraceFiles | None
    """Where the gateway records spans; None for nowhere."""
    num_decode_nodes: int
    """When all run, of all models."""
    variants: tuple[tuple[str, str], ...] = ()
    """Names and checkpoints of the further models."""
    scalings: tuple[PoolScaling, ...]
    """Pools whose size follows their load."""
    drain_s: float
    """How long answers may go on when the gateway ends."""
