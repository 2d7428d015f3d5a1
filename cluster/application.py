"""The Ray Serve application: a gateway over a decode pool over a prefill pool."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.front_door.plan import GatewayLimits
from cluster.options import ClusterConfig, DecodeSection, PrefillSection, VariantSection
from cluster.replicas.decode import DecodeReplica
from cluster.replicas.gateway import GatewayReplica
from cluster.replicas.gateway_options import SUCCESSOR_S, GatewayOptions
from cluster.replicas.prefill import PrefillReplica
from cluster.security.secret_files import SecretFiles
from cluster.serve_names import GATEWAY
from colm.nodes import Role, pool_name
from colm.placement import Placement
from decode_node.node import DecodeOptions
from decode_node.settings import DecodeSettings
from prefill_node.node import PrefillOptions
from prefill_node.settings import PrefillSettings

_Settings = TypeVar("_Settings", PrefillSettings, DecodeSettings)

_HEAD_RESOURCE = "node:__internal_head__"

# How often Serve looks for a replica that has become free, where all are full.
_ROUTING = RequestRouterConfig(initial_backoff_s=0.005, backoff_multiplier=2, max_backoff_s=0.04)
_HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 30.0}
_SHUTDOWN_S = 8.0


def build(
    config: ClusterConfig,
    model_path: Path,
    secrets: SecretFiles,
    *,
    name: str | None = None,
    beside: bool = False,
    is_open: bool = True,
    kept: Mapping[str, int] = MappingProxyType({}),
    leaving: Mapping[str, VariantSection] = MappingProxyType({}),
) -> serve.Application:
    """Bind the gateway and all pools together, by default under the cluster's name.

    Ray keeps what they are bound to, so no secret is among it.

    A deployment's version is a digest of its options, so where an application is replaced, Serve restarts the replicas
    of those alone whose options have changed; with `beside`, the next ones start before the last ones go. `kept` has
    how many replicas a deployment has: where the load says how many, it goes on with these. The gateway listens where
    `is_open`. It serves no variant that is `leaving`, whose decode replicas go on.
    """
    dtype = config.resolved_dtype
    model = str(model_path)
    report_to = (GATEWAY, config.ray.application if name is None else name)
    metrics = config.metrics
    metrics_host = metrics.host if metrics.enabled else None
    traces = config.tracing.files
    surge = 100 if beside else 0
    prefill_options = PrefillOptions(
        model_path=model,
        placement=Placement.of(config.prefill.resolved_device, dtype, config.prefill.num_threads),
        settings=_with_whole_path(_of_node(config.prefill, PrefillSettings)),
    )
    prefill_rest = (secrets, report_to, metrics_host, traces)
    prefill = _deployment(
        PrefillReplica,
        name=(prefill_name := pool_name(Role.PREFILL)),
        replicas=_number(config.prefill, kept.get(prefill_name)),
        max_ongoing=config.prefill.max_streams,
        actor=_actor(config.prefill),
        version=_version(prefill_options, prefill_rest),
        surge=surge,
    ).bind(prefill_options, *prefill_rest)
    further = {**config.model.variants, **leaving}
    paths = {"": model} | {variant: str(section.path.absolute()) for variant, section in further.items()}
    sections: dict[str, DecodeSection] = {"": config.decode, **further}
    pools = []
    for variant, section in sections.items():
        decode_options = DecodeOptions(
            model_path=paths[variant],
            placement=Placement.of(section.resolved_device, dtype, section.num_threads),
            settings=_of_node(section, DecodeSettings),
            prefill_tile_tokens=config.prefill.tile_tokens,
        )
        decode_rest = (config.prefill.max_queued, report_to, metrics_host, traces, variant)
        decode = _deployment(
            DecodeReplica,
            name=(decode_name := pool_name(Role.DECODE, variant)),
            replicas=_number(section, kept.get(decode_name)),
            max_ongoing=section.max_requests,
            actor=_actor(section),
            version=_version(decode_options, secrets, decode_rest),
            surge=surge,
        )
        pools.append(decode.bind(decode_options, secrets, prefill, *decode_rest))
    gateway = config.gateway
    gateway_options = GatewayOptions(
        model_path=model,
        model_name=config.model.served_name,
        dtype=dtype,
        host=gateway.host,
        port=gateway.port,
        http_port=gateway.wanted_http_port,
        max_files_bytes=gateway.max_files_bytes,
        files_folder=None if gateway.files_folder is None else str(gateway.files_folder.absolute()),
        cluster=config.ray.application,
        audit_folder=None if gateway.audit_folder is None else str(gateway.audit_folder.absolute()),
        audit_keep_days=gateway.audit_keep_days,
        metrics_host=metrics_host,
        metrics_port=metrics.port,
        traces=traces,
        num_decode_nodes=config.num_decode_replicas,
        variants=tuple((variant, paths[variant]) for variant in config.model.variants),
        scalings=config.scalings,
        drain_s=gateway.drain_s,
        limits=GatewayLimits(
            max_document_bytes=gateway.max_document_bytes,
            max_upload_bytes=gateway.max_upload_bytes,
            upload_idle_s=gateway.upload_idle_s,
            max_requests=gateway.max_requests,
            default_max_new_tokens=gateway.default_max_new_tokens,
            max_new_tokens=gateway.max_new_tokens,
            default_timeout_s=gateway.default_timeout_s,
            min_prefill_tokens_per_s=gateway.min_prefill_tokens_per_s,
            min_decode_tokens_per_s=gateway.min_decode_tokens_per_s,
            max_timeout_s=gateway.max_timeout_s,
        ),
    )
    return _deployment(
        GatewayReplica,
        name=GATEWAY,
        replicas=1,
        max_ongoing=1000,
        actor={"num_cpus": 0, "resources": {_HEAD_RESOURCE: 0.001}},
        version=_version(gateway_options, secrets),
        surge=100,  # it listens on the ports of the last one, beside it
        shutdown_s=SUCCESSOR_S + gateway.drain_s + 2 * _SHUTDOWN_S,
        user_config={"is_open": is_open},
    ).bind(gateway_options, secrets, *pools)


def _number(section: PrefillSection | DecodeSection, kept: int | None) -> int:
    """How many replicas a deployment begins with: those that its load has brought, within the limits."""
    return section.num_replicas if kept is None else min(max(kept, section.num_replicas), section.most_replicas)


def _of_node(section: PrefillSection | DecodeSection, kind: type[_Settings]) -> _Settings:
    """Of a section what a node has to know: how many there are of it is none of that, and restarts none."""
    return kind(**{name: getattr(section, name) for name in kind.model_fields})


def _with_whole_path(settings: PrefillSettings) -> PrefillSettings:
    """The same with a path that a replica, which has a folder of its own, can use."""
    patterns = settings.sparse_patterns
    return settings.model_copy(update={"sparse_patterns": patterns and patterns.resolve()})


def _version(*options: object) -> str:
    return hashlib.sha256(repr(options).encode()).hexdigest()[:16]


def _deployment(
    replica: type,
    *,
    name: str,
    replicas: int,
    max_ongoing: int,
    actor: dict[str, Any],
    version: str,
    surge: int,
    shutdown_s: float = _SHUTDOWN_S,
    user_config: dict[str, bool] | None = None,
) -> Any:
    return serve.deployment(
        replica,
        name=name,
        max_surge_percent=surge,
        num_replicas=replicas,
        max_ongoing_requests=max_ongoing,
        # Whoever asks Serve for a replica waits in a line of its own, which is bounded.
        max_queued_requests=-1,
        request_router_config=_ROUTING,
        ray_actor_options=actor,
        # Every lease and report would be a line; what matters is in the project's own lines.
        logging_config={"enable_access_log": False},
        **_HEALTH,
        user_config=user_config,
        graceful_shutdown_timeout_s=shutdown_s,
        graceful_shutdown_wait_loop_s=0.2,
    ).options(version=version, _internal=True)  # otherwise each run restarts every replica, changed or not


def _actor(section: PrefillSection | DecodeSection) -> dict[str, Any]:
    # CPU threads are our own to share out: the custom resource alone decides the place.
    return {"num_cpus": 0, "num_gpus": section.num_gpus, "resources": {section.resource: 1}}
