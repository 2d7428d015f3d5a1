"""A decode node as a Ray Serve replica, and the prefill nodes that it borrows from Serve."""

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Final

from cluster.replicas.lender import ServeLender
from cluster.replicas.node import NodeReplica
from cluster.security.secret_files import SecretFiles
from colm.errors import PeerFailed, PeerUnavailable
from colm.line import Beat
from colm.nodes import NodeCounts, NodeLoad, NodeReport, Role
from colm.tracing import TraceFiles
from colm.wire.members import Member
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import PrefillLease, no_other

MAX_KNOWN_NODES: Final = 256
"""Prefill nodes that a pool remembers: those that it lent last."""


class ServePrefillPool:
    """Lends the prefill nodes that Ray Serve runs."""

    def __init__(self, handle: Any, *, max_waiting: int) -> None:
        self._lender = ServeLender(handle, Role.PREFILL, max_waiting=max_waiting, is_alone=False)
        self._num_nodes: int | None = None
        self._known: dict[str, None] = {}
        """Addresses of nodes that have not failed since they were lent, the last one lent at the end."""
        self._num_streams = Counter[str]()
        self._waiting_tokens = Counter[int]()

    @property
    def waiting_tokens(self) -> tuple[int, ...]:
        """Lengths of the prompts that wait for a node."""
        return tuple(self._waiting_tokens.elements())

    def hear(self, counts: NodeCounts) -> None:
        """Take how many nodes there are, and whether anybody else borrows from them; nothing is known before."""
        self._num_nodes = counts.num_prefill
        self._lender.set_alone(counts.num_decode == 1)

    def close(self) -> None:
        """Give back the nodes that nobody uses."""
        self._lender.close()

    def loads(self) -> Mapping[str, int]:
        """Of the nodes that were lent and have not failed since."""
        return {address: self._num_streams[address] for address in self._known}

    @asynccontextmanager
    async def lease(
        self,
        *,
        num_tokens: int,
        beat: Beat,
        preferred: str | None,
        refused_by: Collection[str],
    ) -> AsyncIterator[PrefillLease]:
        """Borrow a node from Serve."""
        if self._num_nodes is not None and refused_by and len(refused_by) >= self._num_nodes:
            raise no_other()
        async with AsyncExitStack() as stack:
            with self._waiting_for(num_tokens):
                lent = self._lender.lease(beat, refused_by=refused_by, wanted=preferred)
                address, lease_id = await stack.enter_async_context(lent)
            stack.enter_context(self._used(address))
            yield PrefillLease(address=address, lease_id=lease_id)

    @contextmanager
    def _waiting_for(self, num_tokens: int) -> Iterator[None]:
        self._waiting_tokens[num_tokens] += 1
        try:
            yield
        finally:
            self._waiting_tokens[num_tokens] -= 1
            if not self._waiting_tokens[num_tokens]:
                del self._waiting_tokens[num_tokens]

    @contextmanager
    def _used(self, address: str) -> Iterator[None]:
        self._known.pop(address, None)
        self._known[address] = None
        while len(self._known) > MAX_KNOWN_NODES:
            del self._known[next(iter(self._known))]
        self._num_streams[address] += 1
        try:
            yield
        except (PeerUnavailable, PeerFailed):
            self._known.pop(address, None)
            raise
        finally:
            self._num_streams[address] -= 1
            if not self._num_streams[address]:
                del self._num_streams[address]


class DecodeReplica(NodeReplica):
    """Runs a `DecodeNode` as a Serve replica.

    Args:
        options: host is replaced by this machine's address.
        prefill: handle of the prefill deployment.
        max_waiting_for_prefill: prompts of this node that may wait for a prefill node.
        gateway: (deployment, application) to which this node reports.
        metrics_host: where Prometheus reads its metrics; None for nowhere.
        traces: where it records spans; None for nowhere.
        variant: the further model that it serves; empty for the cluster's own.
    """

    role = Role.DECODE

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        options: DecodeOptions,
        secrets: SecretFiles,
        prefill: Any,
        max_waiting_for_prefill: int,
        gateway: tuple[str, str],
        metrics_host: str | None,
        traces: TraceFiles | None,
        variant: str = "",
    ) -> None:
        super().__init__()
        self.variant = variant
        self._prefill_pool = ServePrefillPool(prefill, max_waiting=max_waiting_for_prefill)
        security = secrets.of_nodes(Member.DECODE)
        self._node = DecodeNode(replace(options, host=self._host), security, self._prefill_pool, self._leases)
        await self._start(self._node, secrets, gateway, metrics_host, traces)

    async def __del__(self) -> None:
        await super().__del__()
        self._prefill_pool.close()

    def _hear(self, counts: NodeCounts) -> None:
        self._prefill_pool.hear(counts)

    def _report(self) -> NodeReport:
        load = self._node.load
        told = NodeLoad(
            waiting_tokens=self._prefill_pool.waiting_tokens,
            num_prefilling=load.num_prefilling,
            num_pages_prefilling=load.num_pages_prefilling,
            num_pages_wanted=load.num_pages_wanted,
            num_places=load.num_places,
        )
        return self._reported(
            told,
            num_active=load.num_active,
            num_queued=load.num_queued,
            num_pages_total=load.num_pages_total,
            num_pages_used=load.num_pages_used,
        )
