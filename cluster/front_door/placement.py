"""Finds a decode node with room for a job, relays the answer from it, and another one if that is lost."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.node_registry import NodeRegistry
from colm.clock import Clock, Deadline
from colm.errors import CapacityExceeded, ColmError, PeerFailed, PeerRefused, PeerUnavailable, PrefillUnavailable
from colm.events import Event, Finished, ProvisionalToken, Queued, Reserved, ScaleChanged, Token, WaitsFor
from colm.line import Beat
from colm.nodes import Role
from colm.prefix_routes import PrefixRoutes
from colm.provisional import ProvisionalOnce
from colm.request import AttentionMode, KvCodec
from colm.retry import RetryPolicy
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale

logger = logging.getLogger(__name__)

RETRY = RetryPolicy(max_attempts=10, first_pause_s=0.05, last_pause_s=4.0)
"""For calls in a row that brought no token; they last longer than Serve needs to notice that a replica has died."""
MAX_LOST_NODES = 3
"""Nodes that may be lost after they have begun with a request; with the next it ends, for it may be the cause."""

Emit = Callable[[Event], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLease:
    """A decode node, lent for one request."""

    address: str
    lease_id: str


class DecodePool(Protocol):
    """Lends decode nodes."""

    def lease(self, *, beat: Beat, refused_by: Collection[str] = ()) -> AbstractAsyncContextManager[DecodeLease]:
        """Borrow a node for one request, in order of asking.

        Args:
            beat: told of the wait.
            refused_by: addresses of nodes that are not wanted; another one is lent at once, or none.

        Raises:
            PeerUnavailable: no node can be lent.
            CapacityExceeded: too many wait already, or no other node is free.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeJob:
    """A prompt, and how a decode node shall continue it."""

    request_id: str
    token_ids: NDArray[np.int64]
    scale: Changing[Scale]
    """Its client may change it while the answer runs; the next node gets what then holds."""
    max_new_tokens: int
    sampling: SamplingParams
    attention: AttentionMode
    kv_codec: KvCodec
    max_draft_tokens: int | None
    cache_salt: bytes = b""
    """Whose prompt it is; it shares keys and values with prompts of the same alone."""
    made_token_ids: tuple[int, ...] = ()
    """The answer so far; the node goes on behind it."""
    provisional_first_token: bool = False
    """Tell what chain 1 says first, where that comes sooner."""
    answer_key: str = ""
    """Under it another gateway can find the request, after this one is lost."""


class DecodeNodeCalls(Protocol):
    """Calls decode nodes."""

    def decode(
        self, lease: DecodeLease, job: DecodeJob, *, only_if_room: bool, deadline: Deadline
    ) -> AsyncGenerator[Event]:
        """Run a job on a node and yield its events; closing the generator cancels the job.

        The node is told when the job's scale changes.

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

    def leave_answers(self) -> None:
        """From now on a job whose call is closed goes on at its node, if another gateway can ask for it there."""

    def resume(
        self, address: str, answer_key: str, num_tokens: int, *, scale: Changing[Scale | None], deadline: Deadline
    ) -> AsyncGenerator[Event]:
        """Go on with a job that another call began; yields `Resumed`, then its events behind the first `num_tokens`.

        The node is told of a scale that is no longer None.

        Raises:
            UnknownAnswer: the node does not hold it.
            ColmError: as `decode`.
        """


@dataclass(kw_only=True, slots=True)
class _Relayed:
    """What the client has been told of one answer, whichever nodes made it."""

    begun_s: float
    token_ids: list[int]
    lost: list[str]
    """Addresses of the nodes that were lost after they had begun."""
    provisional: ProvisionalOnce
    shunned: set[str] = field(default_factory=set)
    """Addresses of those, and of nodes that failed or do not admit this gateway; asked if no other is free."""
    has_failed: bool = False
    """A node has failed by a defect of its own."""
    provisional_token_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    num_failures: int = 0
    """Calls in a row that brought no token."""

    def see(self, token: Token, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.token_ids.append(token.token_id)
        self.num_failures = 0

    def whole(self, finished: Finished) -> Finished:
        """The last node's word, made one about all nodes."""
        if not self.lost:
            return finished
        usage, timings = replace(finished.usage, num_decode_nodes=1 + len(self.lost)), finished.timings
        if (first_s := self.first_token_s) is not None:
            timings = replace(timings, first_token_s=first_s - self.begun_s, decode_s=self.last_token_s - first_s)
        if (provisional_s := self.provisional_token_s) is not None:
            timings = replace(timings, provisional_token_s=provisional_s - self.begun_s)
        return replace(finished, usage=usage, timings=timings)


class Placement:
    """Brings a job to a decode node with room for it, or else into the line of one; and to another if that is lost.

    With N nodes, a job is refused at most N - 1 times because its pages are not free at once. The node that it gets
    next lets it wait.

    A node that is lost takes nothing with it but time: the next one gets the prompt and the answer so far, and goes on
    with the next token. So does one after a node that failed by itself, once: a second may fail of the same request.

    A job first goes to the node that got the longest beginning of its prompt, if that has room and others are not much
    less busy: all others are then passed over (ADR 41).
    """

    def __init__(
        self,
        pool: DecodePool,
        calls: DecodeNodeCalls,
        registry: NodeRegistry,
        clock: Clock,
        retry: RetryPolicy,
        on_resubmit: Callable[[ColmError], None],
    ) -> None:
        self._pool = pool
        self._calls = calls
        self._registry = registry
        self._clock = clock
        self._retry = retry
        self._on_resubmit = on_resubmit
        self._routes = PrefixRoutes()

    async def run(self, job: DecodeJob, deadline: Deadline, emit: Emit) -> None:
        """Run a job on some node and emit its events; `Finished` is the last.

        Raises:
            CapacityExceeded: no node has room, nor a place in its line.
            PeerUnavailable: too many nodes were lost, or could not be reached; the request may be submitted again.
            PeerFailed: a second node failed by a defect of its own.
            ColmError: whatever else the node refuses or fails with.
        """

        async def beat(num_ahead: int) -> None:
            await emit(Queued(waits_for=WaitsFor.DECODE_NODE, num_ahead=num_ahead))

        relayed = _Relayed(
            begun_s=self._clock.now(),
            token_ids=[*job.made_token_ids],
            lost=[],
            provisional=ProvisionalOnce(has_begun=bool(job.made_token_ids)),
        )
        refusals_left = self._num_others()
        num_calls_lost = 0
        keys = self._routes.keys(job.token_ids, job.cache_salt) if self._num_others() else ()
        is_first = True
        while True:
            # After a lost call its node may still hold the id that was used there.
            name = f"{job.request_id}-{num_calls_lost}" if num_calls_lost else job.request_id
            attempt = replace(job, request_id=name, made_token_ids=tuple(relayed.token_ids))
            address, has_begun = "", False
            try:
                passed_over = self._others(keys) if is_first else ()
                is_first = False
                async with self._lease(beat, relayed.shunned, passed_over) as lease:
                    address = lease.address
                    self._routes.note(keys, address)
                    call = self._calls.decode(lease, attempt, only_if_room=refusals_left > 0, deadline=deadline)
                    async with aclosing(whole(call, lease.address)) as events:
                        async for event in events:
                            has_begun = True
                            await self._relay(event, relayed, emit)
                    return
            except CapacityExceeded as err:
                if refusals_left:
                    refusals_left -= 1
                elif relayed.lost:  # it had room before, and loses nothing by waiting
                    await self._pause(job, relayed, err, beat)
                else:
                    raise
            except PrefillUnavailable:
                raise
            except (PeerUnavailable, PeerFailed) as err:
                if isinstance(err, PeerFailed):
                    if relayed.has_failed:
                        raise
                    relayed.has_failed = True
                num_calls_lost += 1
                if has_begun or isinstance(err, PeerFailed | PeerRefused):
                    relayed.shunned.add(address)
                if has_begun:
                    relayed.lost.append(address)
                    refusals_left = self._num_others()
                await self._pause(job, relayed, err, beat)

    def _num_others(self) -> int:
        return max(1, self._registry.count(Role.DECODE)) - 1

    def _others(self, keys: Sequence[bytes]) -> list[str]:
        """The addresses of all nodes but the one that should have the prompt; none where it is all the same."""
        if self._routes.remembered(keys) is None:
            return []
        nodes = [node.report for node in self._registry.nodes() if node.report.role is Role.DECODE]
        loads = {node.address: node.num_active_requests + node.num_queued_requests for node in nodes}
        wanted = self._routes.find(keys, loads)
        return [] if wanted is None else [node.address for node in nodes if node.address != wanted]

    @asynccontextmanager
    async def _lease(
        self, beat: Beat, shunned: Collection[str], passed_over: Collection[str]
    ) -> AsyncIterator[DecodeLease]:
        """Borrow a node that is not passed over; else one not shunned, whose loss Serve may not know yet; else any."""
        avoided = [each for each in (passed_over, shunned if self._num_others() else ()) if each]
        async with AsyncExitStack() as stack:
            for refused_by in (*avoided, ()):
                try:
                    lease = await stack.enter_async_context(self._pool.lease(beat=beat, refused_by=refused_by))
                    break
                except CapacityExceeded:
                    if not refused_by:
                        raise
            yield lease

    async def _pause(self, job: DecodeJob, relayed: _Relayed, cause: ColmError, beat: Beat) -> None:
        """Wait before the next call.

        Raises:
            ColmError: the cause; there is no next call.
        """
        relayed.num_failures += 1
        pause_s = self._retry.pause_s(relayed.num_failures)
        if pause_s is None or len(relayed.lost) > MAX_LOST_NODES:
            raise cause
        self._on_resubmit(cause)
        logger.warning(
            "request.resubmitted request=%s tokens=%d in_s=%.2f cause=%s",
            job.request_id,
            len(relayed.token_ids),
            pause_s,
            cause,
        )
        if relayed.lost:
            await beat(0)
        await asyncio.sleep(pause_s)

    async def _relay(self, heard: Event, relayed: _Relayed, emit: Emit) -> None:
        if (event := relayed.provisional.see(heard)) is None:
            return
        match event:
            case Reserved() | ScaleChanged():  # between nodes, not for clients
                return
            case ProvisionalToken():
                relayed.provisional_token_s = self._clock.now()
            case Token():
                relayed.see(event, self._clock.now())
            case Finished():
                event = relayed.whole(event)
        await emit(event)


async def whole(call: AsyncGenerator[Event], address: str) -> AsyncGenerator[Event]:
    """A node's events, down to its last word.

    Raises:
        PeerUnavailable: that did not come.
    """
    async with aclosing(call):
        async for event in call:
            yield event
            if isinstance(event, Finished):
                return
    raise PeerUnavailable(f"decode node {address} ended the answer before it was finished; submit it again")
