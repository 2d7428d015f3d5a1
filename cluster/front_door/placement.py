"""Finds a decode node with room for a job, and relays the answer from it."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.node_registry import NodeRegistry
from colm.clock import Deadline
from colm.errors import CapacityExceeded, PeerUnavailable
from colm.events import Event, Finished, Queued, Reserved, WaitsFor
from colm.line import Beat
from colm.nodes import Role
from colm.request import AttentionMode, KvCodec
from colm.sampling import SamplingParams

_MAX_LOST_CALLS = 3

Emit = Callable[[Event], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLease:
    """A decode node, lent for one request."""

    address: str
    lease_id: str


class DecodePool(Protocol):
    """Lends decode nodes."""

    def lease(self, *, beat: Beat) -> AbstractAsyncContextManager[DecodeLease]:
        """Borrow a node for one request, in order of asking.

        Raises:
            PeerUnavailable: no node can be lent.
            CapacityExceeded: too many wait already.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeJob:
    """A prompt, and how a decode node shall continue it."""

    request_id: str
    token_ids: NDArray[np.int64]
    num_chains: int
    max_new_tokens: int
    sampling: SamplingParams
    attention: AttentionMode
    kv_codec: KvCodec
    max_draft_tokens: int | None


class DecodeNodeCalls(Protocol):
    """Calls decode nodes."""

    def decode(
        self, lease: DecodeLease, job: DecodeJob, *, only_if_room: bool, deadline: Deadline
    ) -> AsyncGenerator[Event]:
        """Run a job on a node and yield its events; closing the generator cancels the job.

        Args:
            lease: names the node.
            job: the whole prompt and its options.
            only_if_room: the node refuses the job, rather than let it wait, unless its pages are free now.
            deadline: when the answer must be complete.

        Raises:
            CapacityExceeded: the node has no room.
            LeaseExpired: the lease has ended.
            PeerUnavailable: the node broke off, could not be reached, or broke the protocol.
            ColmError: whatever else the node refuses or fails with.
        """


class Placement:
    """Brings a job to a decode node with room for it, or else into the line of one.

    With N nodes, a job is refused at most N - 1 times because its pages are not free at once. The node that it gets
    next lets it wait.
    """

    def __init__(self, pool: DecodePool, calls: DecodeNodeCalls, registry: NodeRegistry) -> None:
        self._pool = pool
        self._calls = calls
        self._registry = registry

    async def run(self, job: DecodeJob, deadline: Deadline, emit: Emit) -> None:
        """Run a job on some node and emit its events; `Finished` is the last.

        Raises:
            CapacityExceeded: no node has room, nor a place in its line.
            PeerUnavailable: the node broke off after its first event, or too many calls failed before theirs; the
                request may be submitted again.
            ColmError: whatever else the node refuses or fails with.
        """

        async def beat(num_ahead: int) -> None:
            await emit(Queued(waits_for=WaitsFor.DECODE_NODE, num_ahead=num_ahead))

        has_begun = False

        async def emit_first(event: Event) -> None:
            nonlocal has_begun
            has_begun = True
            await emit(event)

        refusals_left = max(1, self._registry.count(Role.DECODE)) - 1
        num_lost = 0
        while True:
            # After a lost call its node may still hold the id that was used there.
            attempt = replace(job, request_id=f"{job.request_id}-{num_lost}") if num_lost else job
            try:
                async with self._pool.lease(beat=beat) as lease:
                    return await self._relay(lease, attempt, refusals_left > 0, deadline, emit_first)
            except CapacityExceeded:
                if not refusals_left:
                    raise
                refusals_left -= 1
            except PeerUnavailable:
                # The lease had run out, or the connection was dead: without an event, another call repeats nothing.
                if has_begun or num_lost == _MAX_LOST_CALLS:
                    raise
                num_lost += 1

    async def _relay(
        self, lease: DecodeLease, job: DecodeJob, only_if_room: bool, deadline: Deadline, emit: Emit
    ) -> None:
        is_finished = False
        async with aclosing(self._calls.decode(lease, job, only_if_room=only_if_room, deadline=deadline)) as events:
            async for event in events:
                is_finished = isinstance(event, Finished)
                if not isinstance(event, Reserved):  # between nodes, not for clients
                    await emit(event)
        if not is_finished:
            raise PeerUnavailable(
                f"decode node {lease.address} ended the answer before it was finished; submit it again"
            )
