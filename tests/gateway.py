"""A gateway in this process, over real decode nodes at known addresses."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from cluster.accounts import Accounts
from cluster.audit_log import AuditLog
from cluster.client_requests import ClientRequests
from cluster.client_tokens import Clients
from cluster.decode_calls import GrpcDecodeCalls
from cluster.front_door.front_door import FrontDoor, Variant
from cluster.front_door.placement import DecodeLease, DecodePool
from cluster.front_door.plan import GatewayLimits, ServedModel
from cluster.generation_service import GenerationService
from cluster.metrics import RequestMetrics
from cluster.node_registry import NodeRegistry
from cluster.openai.app import OpenAiApp
from cluster.openai.files import FileStore
from cluster.state import ClusterState
from cluster.status_page.board import Board
from cluster.status_page.routes import StatusPage
from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.errors import CapacityExceeded
from colm.line import Beat
from colm.model.config import ChainConfig
from colm.nodes import NodeReport, ProcessFacts, Role
from colm.retry import RetryPolicy
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import bind, create_server
from colm.wire.http_server import HttpServer
from colm.wire.security import Security, TlsSource
from tests.clock import FakeClock
from tests.gates import LIMIT_S
from tests.nodes import decode_node, prefill_node

LIMITS = GatewayLimits(
    max_document_bytes=1 << 20,
    max_upload_bytes=1 << 26,
    upload_idle_s=60.0,
    max_requests=64,
    default_max_new_tokens=8,
    max_new_tokens=400,
    default_timeout_s=100.0,
    min_prefill_tokens_per_s=10.0,
    min_decode_tokens_per_s=2.0,
    max_timeout_s=1000.0,
)

RETRY = RetryPolicy(max_attempts=4, first_pause_s=0.001, last_pause_s=0.001)


class TakingTurns:
    """A pool that lends decode nodes at fixed addresses, one after the other."""

    def __init__(self, addresses: Sequence[str], lease_id: str = "") -> None:
        self.lent: list[str] = []
        self._addresses = addresses
        self._lease_id = lease_id

    @asynccontextmanager
    async def lease(
        self,
        *,
        beat: Beat,  # noqa: ARG002 - the pool's contract
        refused_by: Collection[str] = (),
    ) -> AsyncIterator[DecodeLease]:
        if not (wanted := [address for address in self._addresses if address not in refused_by]):
            raise CapacityExceeded("no other decode node is free; try again later")
        self.lent.append(wanted[len(self.lent) % len(wanted)])
        yield DecodeLease(address=self.lent[-1], lease_id=self._lease_id)


def decode_nodes(num_nodes: int, addresses: Sequence[str] = ()) -> NodeRegistry:
    """A registry that knows of that many decode nodes, those at the addresses among them, however slow a test is."""
    registry = NodeRegistry(FakeClock())
    for number in range(num_nodes):
        registry.report(
            NodeReport(
                role=Role.DECODE,
                replica_id=str(number),
                ray_node_id="here",
                address=addresses[number] if number < len(addresses) else "",
                num_active_requests=0,
                num_queued_requests=0,
                num_leases=0,
                process=ProcessFacts.now(),
            )
        )
    return registry


@asynccontextmanager
async def gateway(
    config: ChainConfig,
    pool: DecodePool,
    tokenizer: Tokenizer | None = None,
    num_decode_nodes: int = 1,
    clients: Clients | None = None,
    audit_log: AuditLog | None = None,
    **limits: Any,
) -> AsyncIterator[str]:
    """Run a gateway whose registry knows of that many decode nodes; yields its address. It admits everybody."""
    async with killable_gateway(
        config, pool, tokenizer, num_decode_nodes=num_decode_nodes, clients=clients, audit_log=audit_log, **limits
    ) as running:
        yield running.address


@dataclass(frozen=True)
class RunningGateway:
    """A gateway that can be lost."""

    address: str
    server: grpc.aio.Server
    front_door: FrontDoor
    calls: GrpcDecodeCalls
    metrics: CollectorRegistry

    async def kill(self) -> None:
        """End it without a word to the decode nodes."""
        self.calls._cancel = lambda *_: None  # type: ignore[method-assign]
        await self.server.stop(0)


@asynccontextmanager
async def killable_gateway(
    config: ChainConfig,
    pool: DecodePool,
    tokenizer: Tokenizer | None = None,
    *,
    num_decode_nodes: int = 1,
    addresses: Sequence[str] = (),
    clients: Clients | None = None,
    audit_log: AuditLog | None = None,
    port: int = 0,
    security: Security = Security(),  # noqa: B008 - frozen
    **limits: Any,
) -> AsyncIterator[RunningGateway]:
    """As `gateway`.

    Args:
        security: what it shows to decode nodes.
        addresses: of decode nodes that hold answers.
        port: of a gateway whose place this one takes, or will take; 0 picks a free one.
    """
    server, calls = create_server(Security(), shares_port=True), GrpcDecodeCalls(security)
    registry = CollectorRegistry()
    clients = clients or Clients(None)
    metrics = RequestMetrics(registry, clients)
    chosen = replace(LIMITS, **limits)
    front_door = FrontDoor(
        model=served_model(config, tokenizer),
        limits=chosen,
        decode_pool=pool,
        calls=calls,
        registry=decode_nodes(max(num_decode_nodes, len(addresses)), addresses),
        num_decode_nodes=max(num_decode_nodes, len(addresses)),
        clock=MonotonicClock(),
        retry=RETRY,
        on_resubmit=metrics.resubmitted,
    )
    requests = ClientRequests(front_door, clients, Accounts(MonotonicClock(), audit_log), metrics)
    GenerationService(requests, upload_idle_s=chosen.upload_idle_s).add_to(server)
    port = bind(server, "127.0.0.1", port, Security(), shares_port=True)
    await server.start()
    try:
        yield RunningGateway(f"127.0.0.1:{port}", server, front_door, calls, registry)
    finally:
        await server.stop(0)
        await calls.close()


@asynccontextmanager
async def http_gateway(
    config: ChainConfig,
    pool: DecodePool,
    tokenizer: Tokenizer | None = None,
    *,
    clients: Clients | None = None,
    audit_log: AuditLog | None = None,
    tls: TlsSource | None = None,
    max_files_bytes: int = 1 << 20,
    files_folder: Path | None = None,
    doors: list[FrontDoor] | None = None,
    variants: Sequence[Variant] = (),
    nodes: NodeRegistry | None = None,
    metrics: CollectorRegistry | None = None,
    metrics_address: str = "",
    **limits: Any,
) -> AsyncIterator[str]:
    """`gateway` over HTTP; at the end of the block it must hold nothing.

    Args:
        files_folder: of the documents that it keeps; None for one of its own.
        doors: gets its front door.
        nodes: those that its status page shows.
        metrics: where it counts.
        metrics_address: where that is read.
    """
    clock = MonotonicClock()
    calls, chosen, known = GrpcDecodeCalls(Security()), replace(LIMITS, **limits), clients or Clients(None)
    front_door = FrontDoor(
        model=served_model(config, tokenizer),
        limits=chosen,
        decode_pool=pool,
        calls=calls,
        registry=nodes or decode_nodes(1),
        variants=variants,
        clock=clock,
        metrics_address=metrics_address,
    )
    if doors is not None:
        doors.append(front_door)
    counts = RequestMetrics(metrics or CollectorRegistry(), known)
    requests = ClientRequests(front_door, known, Accounts(clock, audit_log), counts)
    own_folder = tempfile.TemporaryDirectory()
    files = FileStore(
        files_folder or Path(own_folder.name), max_bytes=max_files_bytes, max_document_bytes=chosen.max_document_bytes
    )
    app = OpenAiApp(requests, limits=chosen, files=files)
    page = StatusPage(Board(front_door.status, clock), known)
    server = HttpServer(app.asgi(*page.routes()), host="127.0.0.1", port=0, max_connections=64, tls=tls)
    await server.start()
    try:
        yield server.address
        async with asyncio.timeout(LIMIT_S):
            while app.num_held_bytes or front_door.status().num_active_requests:
                await asyncio.sleep(0.01)
    finally:
        await server.stop()
        await calls.close()
        own_folder.cleanup()


def served_model(config: ChainConfig, tokenizer: Tokenizer | None = None) -> ServedModel:
    """What the gateways here serve."""
    return ServedModel(name="tiny", config=config, tokenizer=tokenizer, fingerprint="f")


@asynccontextmanager
async def cluster_in_this_process(checkpoint: Checkpoint, state_dir: Path) -> AsyncIterator[None]:
    """A gateway over one decode and one prefill node, which a state directory names as it does a cluster."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address]) as node,
        gateway(checkpoint.config, TakingTurns([node.address])) as address,
    ):
        state = ClusterState(gateway_address=address, ray_address="", ray_pid=None, client_token=None, ca_file=None)
        state.write(state_dir)
        yield
