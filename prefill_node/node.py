"""A prefill node, whole: engine, service and server, with or without a cluster around it."""

import asyncio
import logging
from dataclasses import dataclass, field

import grpc
from colm_kernels.prefill_attention import check_backend
from prometheus_client import CollectorRegistry

from colm import defaults
from colm.checkpoint import Checkpoint, prefill_tensor_names
from colm.clock import Clock, MonotonicClock
from colm.errors import ConfigError
from colm.kv import KvFormat, fingerprint
from colm.leases import LeaseTable
from colm.metrics.kv_stream import KvStreamMetrics
from colm.placement import Placement
from colm.watch import Watch
from colm.wire.endpoint import bind, create_server, dial_address
from colm.wire.security import Security
from prefill_node.cost_model import CostModel, calibrate
from prefill_node.engine import PrefillEngine
from prefill_node.memory import default_memory_bytes, default_prefix_cache_bytes, require_room_for_a_tile
from prefill_node.metrics import PrefillMetrics
from prefill_node.prefill_loop import PrefillLoop
from prefill_node.prefix_cache import PrefixCache
from prefill_node.service import PrefillService
from prefill_node.settings import PrefillSettings
from prefill_node.sparse.patterns import PatternFile
from prefill_node.sparse.planner import SparsePlanner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillOptions:
    """How to run one prefill node."""

    model_path: str
    """Checkpoint directory; only chain 1 is read."""
    placement: Placement
    """Where it computes, and in what."""
    settings: PrefillSettings = field(default_factory=PrefillSettings)
    """How it works."""
    job_lease_s: float = defaults.JOB_LEASE_S
    """How long a prompt is kept whose stream has broken."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 picks a free port."""


class PrefillNode:
    """Create with `start`, end with `stop`.

    Args:
        leases: None serves any caller that has the token.
    """

    def __init__(self, options: PrefillOptions, security: Security, leases: LeaseTable | None = None) -> None:
        self._options = options
        self._security = security
        self._leases = leases
        self._server: grpc.aio.Server = create_server(security)
        self._loop: PrefillLoop | None = None
        self._watch: Watch | None = None
        self.metrics = CollectorRegistry()
        self.address = ""
        self.fingerprint = ""
        self.service: PrefillService

    async def start(self) -> None:
        """Load chain 1 and listen.

        Raises:
            CheckpointError: the checkpoint cannot be served.
            ConfigError: the device or the attention backend is not there, the file of patterns cannot be used, or
                memory has no room for a tile.
            OSError: the port is taken, or the host is not this machine's.
        """
        options, settings = self._options, self._options.settings
        clock = MonotonicClock()
        loaded = await asyncio.to_thread(_load, options, clock)
        self.fingerprint = loaded.fingerprint
        self._loop = PrefillLoop(
            loaded.engine,
            loaded.costs,
            clock,
            max_queued=settings.max_queued,
            max_queued_s=settings.max_queued_s,
            memory_bytes=loaded.memory_bytes,
            lease_s=options.job_lease_s,
            stall_s=settings.stall_s,
            prefixes=PrefixCache(
                loaded.engine.kv_format,
                tile_tokens=settings.tile_tokens,
                budget_bytes=loaded.prefix_cache_bytes,
                fingerprint=loaded.fingerprint,
                device=options.placement.device,
            ),
        )
        loop = self._loop
        self._watch = Watch(clock, lambda: loop.mark)
        self.service = PrefillService(
            loaded.engine,
            self._loop,
            fingerprint=self.fingerprint,
            planner=loaded.planner,
            metrics=KvStreamMetrics(self.metrics),
            audit=settings.audit_policy,
            leases=self._leases,
            shares_memory=settings.shared_memory == "auto",
            takes_prefixes=(tls := self._security.current_tls) is not None and tls.caller_name is not None,
        )
        PrefillMetrics(self._loop, self.metrics)
        self.service.add_to(self._server)
        port = bind(self._server, options.host, options.port, self._security)
        await self._server.start()
        self.address = dial_address(options.host, port)
        logger.info(
            "prefill.ready address=%s device=%s fingerprint=%s",
            self.address,
            options.placement.device,
            self.fingerprint[:16],
        )

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's work, if there is any, goes on."""
        return self._watch is not None and self._watch.goes_on()

    async def stop(self) -> None:
        """Let running streams end within a grace period, then break them off."""
        await self._server.stop(defaults.STOP_GRACE_S)
        if self._loop is not None:
            await self._loop.stop()

    async def serve(self) -> None:
        """Wait until stopped."""
        await self._server.wait_for_termination()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    engine: PrefillEngine
    costs: CostModel
    planner: SparsePlanner
    memory_bytes: int
    prefix_cache_bytes: int
    fingerprint: str


def _load(options: PrefillOptions, clock: Clock) -> _Loaded:
    placement, settings = options.placement, options.settings
    placement.take()
    checkpoint = Checkpoint.open(options.model_path)
    config, path = checkpoint.config, settings.sparse_patterns
    patterns = None if path is None else PatternFile.read(path, config)
    checkpoint.require_finite(prefill_tensor_names(config))
    kv_format = KvFormat.of(config, placement.dtype)
    try:
        check_backend(settings.attention_backend, placement.device, placement.dtype, kv_format.head_dim)
    except ValueError as err:
        raise ConfigError(f"attention_backend={settings.attention_backend!r}: {err}") from err
    engine = PrefillEngine(
        checkpoint,
        kv_format,
        tile_tokens=settings.tile_tokens,
        device=placement.device,
        attention_backend=settings.attention_backend,
    )
    costs = calibrate(engine, clock)
    asked_bytes = settings.prefix_cache_bytes
    prefix_cache_bytes = default_prefix_cache_bytes(placement.device) if asked_bytes is None else int(asked_bytes)
    memory_bytes = settings.memory_bytes or default_memory_bytes(placement.device, prefix_cache_bytes)
    require_room_for_a_tile(config, placement.dtype, tile_tokens=settings.tile_tokens, memory_bytes=memory_bytes)
    return _Loaded(
        engine=engine,
        costs=costs,
        planner=SparsePlanner(config, settings.sparse_policy, patterns),
        memory_bytes=memory_bytes,
        prefix_cache_bytes=prefix_cache_bytes,
        fingerprint=fingerprint(checkpoint, kv_format),
    )
