"""Fetches a prompt's keys and values, from one prefill node after another until all have arrived."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from colm import defaults, tracing
from colm.clock import Clock
from colm.errors import CapacityExceeded, ColmError, PeerFailed, PeerRefused, PeerUnavailable, PrefillUnavailable
from colm.events import PrefillProgress, Queued, SparseReport, WaitsFor
from colm.kv_position import KV_START
from colm.line import BEAT_INTERVAL_S, wait_at_most
from colm.metrics.kv_stream import KvStreamMetrics
from colm.prefix_routes import PrefixRoutes
from colm.request import AttentionMode, KvCodec
from colm.retry import RetryPolicy
from colm.wire import endpoint
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease
from decode_node.prefill_pool import PrefillLease, PrefillPool
from decode_node.transfer_ledger import TransferLedger

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 0.1

Emit = Callable[[PrefillProgress | Queued], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvTransfer:
    """One attempt to fetch a prompt's keys and values."""

    ledger: TransferLedger
    """The ledger of all attempts. This attempt is its newest epoch, and begins at its position."""
    fingerprint: str
    token_ids: NDArray[np.int64]
    table_M: NDArray[np.int32]
    """Page ids; see `KvStore.page_table`."""
    attention: AttentionMode = "dense"
    codec: KvCodec = "raw"
    cache_salt: bytes = b""
    """The prefill node shares what it keeps among prompts of the same one alone."""
    held_tile_tokens: int = 0
    """Of the prefill node's tiles that brought what lies before the ledger's first token, bit by bit; 0: not so."""
    last_token_id: int | None = None
    """The token behind the prompt, if the prefill node shall say what chain 1 says next."""
    on_next_token: Callable[[], None] = lambda: None
    """Called in the receiving thread once it has."""


class Receiver(Protocol):
    """Runs one transfer in a thread; `KvReceiver` is the real one. Its attributes are described there."""

    queued: Queued | None
    started_s: float | None
    heard_s: float | None
    sparse: SparseReport | None
    num_cached_tokens: int
    tile_tokens: int | None
    next_token_id: int | None

    def run(self) -> None:
        """Receive everything; called in a thread. Once it has returned, nothing is written any more."""

    def cancel(self) -> None:
        """Make `run` return soon; from any thread, at any time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvOrder:
    """A prompt whose keys and values are wanted, and the pages for them."""

    request_id: str
    token_ids: NDArray[np.int64]
    pages: PageLease
    table_M: NDArray[np.int32]
    attention: AttentionMode = "dense"
    """The same in every attempt: dense and sparse tiles do not fit together above layer 0."""
    codec: KvCodec = "raw"
    """In which they travel."""
    first_token: int = 0
    """What lies before it is in the pages already, and is not sent: a multiple of the prefill node's tiles."""
    tile_tokens: int = 0
    """What the prefill node's tiles are taken to be."""
    cache_salt: bytes = b""
    """The prefill node shares what it keeps among prompts of the same one alone."""
    is_prefix_exact: bool = True
    """Prefill nodes of `tile_tokens` have brought what lies before `first_token`."""

    @property
    def held_tile_tokens(self) -> int:
        """Of the tiles before `first_token` whose bits are those of the engine that computed them; 0 for none."""
        is_offered = self.first_token > 0 and self.is_prefix_exact
        return self.tile_tokens if is_offered and (self.attention, self.codec) == ("dense", "raw") else 0

    last_token_id: int | None = None
    """The token behind the prompt, if what chain 1 says next is wanted."""
    on_next_token: Callable[[int], Awaitable[None]] | None = None
    """Told of that, at most once, and before the fetch ends."""


@dataclass(kw_only=True, slots=True)
class KvAccount:
    """Streams, bytes and seconds of one request's fetching, over all attempts."""

    num_kv_streams: int = 0
    kv_received_bytes: int = 0
    kv_shared_bytes: int = 0
    kv_effective_bytes: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    sparse: SparseReport | None = None
    num_cached_tokens: int = 0
    """Of the prompt, what the prefill node that came last had kept from an earlier one."""
    tile_tokens: set[int] = field(default_factory=set)
    """What the prefill nodes' tiles were."""


class KvFetcher:
    """Fetches the keys and values of many requests at once.

    Args:
        prefill_pool: lends a prefill node for each attempt.
        receive: makes the receiver of an attempt.
        page_line: holds the pages that a receiving thread writes, until the thread has ended.
        fingerprint: `colm.kv.fingerprint` that a prefill node must serve.
        num_layers: layers of keys and values.
        max_transfers: threads that may receive at once.
        metrics: counts the streams.
        tile_tokens: of the prefill nodes' tiles, until one says.
    """

    def __init__(
        self,
        *,
        prefill_pool: PrefillPool,
        receive: Callable[[KvTransfer, PrefillLease], Receiver],
        page_line: PageLine,
        fingerprint: str,
        num_layers: int,
        max_transfers: int,
        clock: Clock,
        retry: RetryPolicy,
        metrics: KvStreamMetrics,
        tile_tokens: int = defaults.TILE_TOKENS,
    ) -> None:
        self.tile_tokens = tile_tokens
        """Of the prefill nodes' tiles, as one said last; 0 where it is not known."""
        self._prefill_pool = prefill_pool
        self._receive = receive
        self._page_line = page_line
        self._fingerprint = fingerprint
        self._num_layers = num_layers
        self._clock = clock
        self._retry = retry
        self._metrics = metrics
        self._routes = PrefixRoutes()
        self._threads = ThreadPoolExecutor(max_workers=max_transfers, thread_name_prefix="kv-receiver")

    async def stop(self) -> None:
        """Wait until no thread receives any more; every fetch must have ended."""
        await asyncio.to_thread(self._threads.shutdown)

    async def fetch(self, order: KvOrder, account: KvAccount, emit: Emit) -> None:
        """Bring every token's keys and values into the order's pages.

        Raises:
            PrefillUnavailable, PeerFailed: all attempts that the policy allows have failed; how the last one did.
            CapacityExceeded: no node has room for the prompt; what the last one said.
            FingerprintMismatch: the prefill nodes serve something else.
        """
        ledger = TransferLedger(
            # Another decode node may serve a request of the same id; a prefill node knows transfers by their ids alone.
            transfer_id=f"{order.request_id}.{secrets.token_hex(4)}",
            num_layers=self._num_layers,
            num_tokens=len(order.token_ids),
            first_token=order.first_token,
        )
        holder = _Holder(ledger)
        for num_failures in count(1):
            try:
                return await self._attempt(holder, order, account, emit)
            except (PeerUnavailable, PeerFailed) as err:
                if (pause_s := self._retry.pause_s(num_failures)) is None:
                    kind = PeerFailed if isinstance(err, PeerFailed) else PrefillUnavailable
                    raise kind(f"gave up after {num_failures} attempts to prefill; the last: {err}") from err
                logger.warning("transfer.retry request=%s in_s=%.2f cause=%s", order.request_id, pause_s, err)
                await asyncio.sleep(pause_s)

    async def _attempt(self, holder: "_Holder", order: KvOrder, account: KvAccount, emit: Emit) -> None:
        """Fetch from a node; one that refuses, the prompt or its caller, is followed by the free ones, once each.

        The first to be asked is the one that holds the transfer's job, or has been asked for the longest beginning.
        """
        num_tokens, refusals = len(order.token_ids), dict[str, ColmError]()
        # A sparse plan follows a whole prompt: a prefill node keeps nothing of it for another.
        keys = self._routes.keys(order.token_ids, order.cache_salt) if order.attention == "dense" else ()

        async def beat(num_ahead: int) -> None:
            await emit(Queued(waits_for=WaitsFor.PREFILL_NODE, num_ahead=num_ahead))

        while True:
            asked_s = self._clock.now()
            preferred = holder.address or self._routes.find(keys, self._prefill_pool.loads())
            try:
                async with self._prefill_pool.lease(
                    num_tokens=num_tokens, beat=beat, preferred=preferred, refused_by=refusals
                ) as lease:
                    self._routes.note(keys, lease.address)
                    try:
                        with tracing.span("fetch_kv", node=lease.address):
                            await self._transfer(lease, asked_s, holder, order, account, emit)
                    except (CapacityExceeded, PeerRefused) as refusal:
                        refusals[lease.address] = refusal
                        raise
            except (CapacityExceeded, PeerRefused) as err:
                if err not in refusals.values():  # the pool has no node to lend
                    raise next(reversed(refusals.values()), err) from None
                logger.info("transfer.refused request=%s by=%s", order.request_id, lease.address)
            else:
                return await emit(PrefillProgress(num_tokens_done=num_tokens, num_tokens_total=num_tokens))

    async def _transfer(
        self, lease: PrefillLease, asked_s: float, holder: "_Holder", order: KvOrder, account: KvAccount, emit: Emit
    ) -> None:
        ledger = holder.ledger
        account.num_kv_streams = ledger.begin()
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake(*_: object) -> None:
            loop.call_soon_threadsafe(woken.set)

        transfer = KvTransfer(
            ledger=ledger,
            fingerprint=self._fingerprint,
            token_ids=order.token_ids,
            table_M=order.table_M,
            attention=order.attention,
            codec=order.codec,
            cache_salt=order.cache_salt,
            held_tile_tokens=order.held_tile_tokens,
            last_token_id=None if holder.has_next_token else order.last_token_id,
            on_next_token=wake,
        )
        receiver = self._receive(transfer, lease)
        thread = self._start(receiver, order.pages)
        thread.add_done_callback(wake)
        try:
            with self._metrics.stream(is_resumed=ledger.position > KV_START) as count:
                try:
                    await self._follow(thread, woken, receiver, holder, order, emit)
                finally:
                    count.num_tiles, count.payload_bytes = ledger.num_tiles, ledger.payload_bytes
                    count.shared_bytes = ledger.shared_bytes
            account.sparse = receiver.sparse
            account.num_cached_tokens = receiver.num_cached_tokens
        finally:
            receiver.cancel()
            ended_s = self._clock.now()
            started_s = ended_s if receiver.started_s is None else receiver.started_s
            if receiver.tile_tokens is not None:
                self.tile_tokens = receiver.tile_tokens
                account.tile_tokens.add(receiver.tile_tokens)
            account.queue_s += started_s - asked_s
            account.prefill_s += ended_s - started_s
            account.kv_received_bytes += ledger.payload_bytes
            account.kv_shared_bytes += ledger.shared_bytes
            account.kv_effective_bytes += ledger.effective_bytes
            holder.note(lease.address, None if receiver.heard_s is None else ended_s - receiver.heard_s)

    def _start(self, receiver: Receiver, pages: PageLease) -> "Future[None]":
        """Run the receiver in a thread. The thread holds the pages until it has ended, whatever the request does."""
        loop = asyncio.get_running_loop()
        self._page_line.retain(pages)
        thread = self._threads.submit(copy_context().run, receiver.run)
        thread.add_done_callback(lambda _: loop.call_soon_threadsafe(self._page_line.release, pages))
        return thread

    async def _follow(
        self,
        thread: "Future[None]",
        woken: asyncio.Event,
        receiver: Receiver,
        holder: "_Holder",
        order: KvOrder,
        emit: Emit,
    ) -> None:
        reported: PrefillProgress | Queued | None = None
        next_beat_s = 0.0
        while True:
            woken.clear()
            has_ended = thread.done()  # before what it has left is looked at
            if (token_id := receiver.next_token_id) is not None and not holder.has_next_token:
                holder.has_next_token = True
                if order.on_next_token is not None:
                    await order.on_next_token(token_id)
            if has_ended:
                break
            news = _news(receiver, holder.ledger, len(order.token_ids))
            if news is not None and (news != reported or self._clock.now() >= next_beat_s):
                await emit(news)
                reported, next_beat_s = news, self._clock.now() + BEAT_INTERVAL_S
            await wait_at_most(woken, _LOOK_INTERVAL_S)
        thread.result()


@dataclass(slots=True)
class _Holder:
    """Remembers of a transfer's attempts what the next one must know."""

    ledger: TransferLedger
    address: str | None = None
    """Of the prefill node that may still hold the transfer's job."""
    has_next_token: bool = False
    """A prefill node has said what chain 1 says next."""

    def note(self, address: str, silence_s: float | None) -> None:
        """Note that an attempt at an address has ended, `silence_s` after its last message; None if none came.

        The node is preferred for the next attempt if it brought tiles, was not silent, and was not preferred already.
        A silent node may have been stopped; waiting for it would delay the prompt while another node could compute.
        """
        is_alive = silence_s is not None and silence_s < endpoint.KEEPALIVE.timeout_ms / 2e3
        self.address = address if is_alive and self.ledger.payload_bytes and self.address != address else None


def _news(receiver: Receiver, ledger: TransferLedger, num_tokens: int) -> PrefillProgress | Queued | None:
    if receiver.started_s is not None:
        return PrefillProgress(num_tokens_done=ledger.num_tokens_done, num_tokens_total=num_tokens)
    return receiver.queued
