"""The gateway as a Ray Serve replica, with a gRPC server of its own: Serve's has neither TLS nor tokens."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.accounts import Accounts, Use
from cluster.audit_log import AuditLog
from cluster.autoscaling.autoscaler import Autoscaler
from cluster.autoscaling.signals import PoolScaling
from cluster.change import weights_stamp
from cluster.client_requests import ClientRequests
from cluster.decode_calls import GrpcDecodeCalls
from cluster.front_door.front_door import FrontDoor, Variant
from cluster.front_door.placement import DecodeLease
from cluster.front_door.plan import GatewayLimits, ServedModel
from cluster.generation_service import GenerationService
from cluster.metrics import PoolMetrics, RequestMetrics, targets
from cluster.node_registry import NodeRegistry
from cluster.openai.app import OpenAiApp
from cluster.openai.files import FileStore
from cluster.replicas.leaving import Leaving
from cluster.replicas.lender import ServeLender
from cluster.replicas.replica_numbers import ServeReplicaNumbers
from cluster.replicas.reporting import log_beside
from cluster.replicas.serve_port import keep_serve_port_shut
from cluster.replicas.telling import Telling
from cluster.security.certificates import keep_looking_after
from cluster.security.secret_files import SecretFiles
from cluster.status_page.board import Board
from cluster.status_page.routes import StatusPage
from colm import defaults
from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.dtypes import parse_dtype
from colm.kv import KvFormat, fingerprint
from colm.line import Beat
from colm.metrics.endpoint import MetricsEndpoint
from colm.nodes import NodeCounts, NodeReport, Role
from colm.text.tokenizer import Tokenizer
from colm.tracing import TraceFiles, trace_to
from colm.wire.endpoint import bind, create_server, dial_address
from colm.wire.health import BoundedHealth
from colm.wire.http_server import HttpServer
from colm.wire.members import Member
from colm.wire.v1 import generation_service_pb2

logger = logging.getLogger(__name__)

_SERVICE = generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


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


SUCCESSOR_S = 60.0
"""How long a gateway that leaves goes on as before, until another one listens."""


class ServeDecodePool:
    """Lends the decode nodes that Ray Serve runs."""

    def __init__(self, handle: Any, *, max_waiting: int) -> None:
        # There is one gateway.
        self._lender = ServeLender(handle, Role.DECODE, max_waiting=max_waiting, is_alone=True)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a node."""
        return self._lender.num_waiting

    def close(self) -> None:
        """Give back the nodes that nobody uses."""
        self._lender.close()

    @asynccontextmanager
    async def lease(self, *, beat: Beat, refused_by: Collection[str] = ()) -> AsyncIterator[DecodeLease]:
        """Borrow a node from Serve."""
        async with self._lender.lease(beat, refused_by=refused_by) as (address, lease_id):
            yield DecodeLease(address=address, lease_id=lease_id)


class GatewayReplica:
    """Runs the front door behind a gRPC server, with health service and reflection.

    Args:
        secrets: token and TLS that are demanded of clients, and those for calls to decode nodes.
        decode: handle of the decode deployment.
        variants: handles of those of the further models, in the order of the options.
    """

    _metrics: MetricsEndpoint | None = None
    _scaling: asyncio.Task[None] | None = None
    _is_up = False
    _address = ""
    _closing: asyncio.Future[Any] | None = None
    """It listens no more, and ends what it has."""
    _end_traces: Callable[[], None] | None = None
    _passing_files: FileStore | None = None
    """Documents that end with the cluster."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, options: GatewayOptions, secrets: SecretFiles, decode: Any, *variants: Any
    ) -> None:
        log_beside("ray.serve")
        keep_serve_port_shut()
        self._leaving = Leaving()
        self._name = uuid4().hex
        self._opened = asyncio.Event()
        if options.traces is not None:
            self._end_traces = trace_to(options.traces, "gateway")
        model = await asyncio.to_thread(_load, options.model_name, options.model_path, options.dtype)
        # The handles of variants that are about to go come last, and nobody is lent these.
        self._pools = {
            name: ServeDecodePool(handle, max_waiting=options.limits.max_requests)
            for name, handle in zip(["", *dict(options.variants)], (decode, *variants), strict=False)
        }
        further = [
            Variant(model=await asyncio.to_thread(_load, name, path, options.dtype), decode_pool=self._pools[name])
            for name, path in options.variants
        ]
        self._registry = NodeRegistry(MonotonicClock())
        self._decode_calls = GrpcDecodeCalls(secrets.of_nodes(Member.GATEWAY))
        registry = CollectorRegistry()
        metrics = RequestMetrics(registry, clients := secrets.clients())
        self._front_door = front_door = FrontDoor(
            model=model,
            limits=options.limits,
            decode_pool=self._pools[""],
            calls=self._decode_calls,
            registry=self._registry,
            clock=MonotonicClock(),
            num_decode_nodes=options.num_decode_nodes,
            variants=further,
            on_resubmit=metrics.resubmitted,
            metrics_address=await self._serve_metrics(registry, options),
        )
        client_security = secrets.of_clients()
        # The gateway that takes this one's place begins to listen before this one ends.
        self._drain_s = options.drain_s
        self._server: grpc.aio.Server = create_server(
            client_security, lambda token: clients.of(token) is not None, shares_port=True
        )
        audit, keep_days = options.audit_folder, options.audit_keep_days
        audit_log = None if audit is None else AuditLog(Path(audit), keep_days=keep_days)
        self._accounts = Accounts(MonotonicClock(), audit_log)
        requests = ClientRequests(front_door, clients, self._accounts, metrics)
        folder = _session_folder(options.cluster) if options.files_folder is None else Path(options.files_folder)
        files = FileStore(
            folder, max_bytes=options.max_files_bytes, max_document_bytes=options.limits.max_document_bytes
        )
        self._passing_files = files if options.files_folder is None else None
        app = OpenAiApp(requests, limits=options.limits, files=files)
        page = StatusPage(Board(front_door.status, MonotonicClock()), clients)
        self._http = HttpServer(
            app.asgi(*page.routes()),
            host=options.host,
            port=options.http_port,
            max_connections=2 * options.limits.max_requests,
            tls=client_security.tls,
            shares_port=True,
        )
        GenerationService(requests, upload_idle_s=options.limits.upload_idle_s).add_to(self._server)
        self._health = BoundedHealth()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", _SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        names = (
            _SERVICE,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)
        self._looking_after = asyncio.create_task(keep_looking_after(secrets))
        if options.scalings:
            PoolMetrics(self._registry, options.model_name, registry)
            numbers = ServeReplicaNumbers(serve.get_replica_context().app_name)
            scaler = Autoscaler(
                options.scalings,
                self._registry,
                numbers,
                MonotonicClock(),
                lambda variant: self._pools[variant].num_waiting,
            )
            self._scaling = asyncio.create_task(scaler.run())
        self._bind = partial(bind, self._server, options.host, options.port, client_security, shares_port=True)
        self._host = options.host
        self._is_up = True

    async def reconfigure(self, config: dict[str, bool]) -> None:
        """Listen, once it may: Serve calls this behind `__init__`, and when `is_open` changes."""
        if config["is_open"] and not self._address:
            port = self._bind()
            await self._server.start()
            await self._http.start()
            self._address = dial_address(self._host, port)
            self._opened.set()
            logger.info("gateway.ready address=%s http=%s", self._address, self._http.address)

    async def _serve_metrics(self, registry: CollectorRegistry, options: GatewayOptions) -> str:
        if (host := options.metrics_host) is None:
            return ""
        self._metrics = metrics = MetricsEndpoint(
            registry,
            host=host,
            port=options.metrics_port,
            targets=lambda: targets(metrics.address, self._registry.nodes(), options.model_name),
            shares_port=True,
            is_ready=lambda: all(self._registry.count(role) for role in (Role.PREFILL, Role.DECODE)),
        )
        await metrics.start()
        return metrics.address

    async def addresses(self) -> tuple[str, str]:
        """host:port where clients on this machine are served, over gRPC and over HTTP, once it listens."""
        await self._opened.wait()
        return self._address, self._http.address

    async def check_health(self) -> None:
        """Serve calls it once a second, and replaces this replica when it has raised three times in a row."""
        self._leaving.check()

    async def report(self, report: NodeReport) -> NodeCounts | None:
        """Take a node's report; returns how many nodes there are, once that is known."""
        self._registry.report(report)
        return self._registry.counts()

    async def hear_use(self, teller: str, uses: dict[str, Use]) -> None:
        """Count what clients still use at a gateway that gives way to this one."""
        if teller != self._name:  # Serve may have sent it here before it knew of the other one
            self._accounts.hear(teller, uses)

    async def drain(self, bound_s: float, successor: str | None) -> None:
        """Take no new request, say so to health checks, and return once those that are inside have ended.

        Args:
            bound_s: longest wait; what is left then is handed over.
            successor: application of another gateway that listens on the same ports, which from now on gets every new
                connection; without one the cluster ends, and with it its clients' files.
        """
        if self._scaling is not None:
            self._scaling.cancel()
        telling = None
        if successor is not None and self._closing is None:
            if not self._front_door.is_going:
                telling = Telling(self._accounts, partial(self._tell_use, successor))
            longest_s = bound_s + defaults.STOP_GRACE_S
            self._closing = asyncio.gather(self._server.stop(longest_s), self._http.stop(longest_s))
            if self._metrics is not None:
                await self._metrics.stop()
        await self._health.enter_graceful_shutdown()
        await self._front_door.drain(bound_s, None if telling is None else telling.end)
        if telling is not None:
            await telling.end()
        if successor is None and self._passing_files is not None:
            await self._passing_files.forget_all()

    async def _tell_use(self, application: str, uses: Mapping[str, Use]) -> None:
        await self._gateway_of(application).hear_use.remote(self._name, uses)

    def _gateway_of(self, application: str) -> Any:
        return serve.get_deployment_handle(serve.get_replica_context().deployment, application)

    async def _until_succeeded(self) -> None:
        """Go on until another gateway listens. Serve sends its calls to that one alone by now, once it is there."""
        if self._scaling is not None:
            self._scaling.cancel()  # nodes report to the successor by now
        try:
            async with asyncio.timeout(SUCCESSOR_S):
                await self._gateway_of(serve.get_replica_context().app_name).addresses.remote()
        except (TimeoutError, RayError, RayServeException) as err:
            logger.warning("gateway.no_successor cause=%r", err)

    async def __del__(self) -> None:
        if self._is_up:
            self._looking_after.cancel()
            if self._leaving.has_begun and not self._front_door.is_going:
                await self._until_succeeded()
            await self.drain(self._drain_s, successor=serve.get_replica_context().app_name)
            await self._server.stop(defaults.STOP_GRACE_S)  # whoever watches its health has no end
            assert self._closing is not None
            await self._closing
            for pool in self._pools.values():
                pool.close()
            await self._decode_calls.close()
        if self._end_traces is not None:
            self._end_traces()


def _session_folder(cluster: str) -> Path:
    """Where files of clients lie that end with the cluster: every gateway of it runs on this machine."""
    context: Any = ray.get_runtime_context()
    return Path(str(context.get_temp_dir())) / str(context.get_session_name()) / f"files-{cluster}"


def _load(name: str, path: str, dtype: str) -> ServedModel:
    checkpoint = Checkpoint.open(path)
    found = fingerprint(checkpoint, KvFormat.of(checkpoint.config, parse_dtype(dtype)))
    stamp = weights_stamp(checkpoint.weights_path)
    return ServedModel(
        name=name,
        config=checkpoint.config,
        tokenizer=Tokenizer.load(checkpoint),
        fingerprint=found,
        revision=hashlib.sha256(f"{found} {stamp}".encode()).hexdigest()[:32],
    )
