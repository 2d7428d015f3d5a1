"""The gateway as a Ray Serve replica: what it is made of, and what Serve, the nodes and other gateways call."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.accounts import Accounts, Use
from cluster.audit_log import AuditLog
from cluster.autoscaling.autoscaler import Autoscaler
from cluster.change import weights_stamp
from cluster.client_requests import ClientRequests
from cluster.decode_calls import GrpcDecodeCalls
from cluster.front_door.front_door import FrontDoor, Variant
from cluster.front_door.plan import ServedModel
from cluster.metrics import PoolMetrics, RequestMetrics, targets
from cluster.node_registry import NodeRegistry
from cluster.openai.app import OpenAiApp
from cluster.openai.files import FileStore
from cluster.replicas.client_ports import ClientPorts
from cluster.replicas.decode_pool import ServeDecodePool
from cluster.replicas.gateway_options import SUCCESSOR_S, GatewayOptions
from cluster.replicas.leaving import Leaving
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
from colm.metrics.endpoint import MetricsEndpoint
from colm.nodes import NodeCounts, NodeReport, Role
from colm.text.tokenizer import Tokenizer
from colm.tracing import trace_to
from colm.wire.members import Member

logger = logging.getLogger(__name__)


class GatewayReplica:
    """Runs the front door behind two ports for clients.

    Args:
        secrets: token and TLS that are demanded of clients, and those for calls to decode nodes.
        decode: handle of the decode deployment.
        variants: handles of those of the further models, in the order of the options.
    """

    _metrics: MetricsEndpoint | None = None
    _scaling: asyncio.Task[None] | None = None
    _is_up = False
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
        self._drain_s = options.drain_s
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
        self._ports = ClientPorts(options, secrets.of_clients(), requests, app.asgi(*page.routes()))
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
        self._is_up = True

    async def reconfigure(self, config: dict[str, bool]) -> None:
        """Listen, once it may: Serve calls this behind `__init__`, and when `is_open` changes."""
        if config["is_open"] and not self._ports.is_open:
            await self._ports.open()

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
        return await self._ports.addresses()

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
        if successor is not None and not self._ports.is_closing:
            if not self._front_door.is_going:
                telling = Telling(self._accounts, partial(self._tell_use, successor))
            self._ports.close(bound_s + defaults.STOP_GRACE_S)
            if self._metrics is not None:
                await self._metrics.stop()
        await self._ports.say_that_it_goes()
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
            await self._ports.end()
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
