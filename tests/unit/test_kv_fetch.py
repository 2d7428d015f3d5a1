"""Fetching a prompt's keys and values: which failures are tried again, how often, and what is counted."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from colm.errors import (
    CapacityExceeded,
    ColmError,
    FingerprintMismatch,
    LeaseExpired,
    PeerFailed,
    PeerUnavailable,
    PrefillUnavailable,
)
from colm.events import LayerRecall, PrefillProgress, Queued, SparseReport, WaitsFor
from colm.kv_position import KvPosition
from colm.line import Beat
from colm.metrics.kv_stream import KvStreamMetrics
from colm.request import AttentionMode, KvCodec
from colm.retry import RetryPolicy
from decode_node.kv_fetch import KvAccount, KvFetcher, KvOrder, KvTransfer
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease, PagePool
from decode_node.prefill_pool import PrefillLease
from decode_node.prefix_cache import PagesWanted
from decode_node.transfer_ledger import Arrival, TransferLedger
from tests.clock import FakeClock

NUM_TOKENS = 100
TILE_TOKENS = 10  # what each attempt brings
BYTES = 4096
AT_ONCE = RetryPolicy(max_attempts=8, first_pause_s=0.0, last_pause_s=0.0)
LIMIT_S = 30.0


class ScriptedReceiver:
    """A receiver that waits, starts and ends as its test says, and moves the clock meanwhile."""

    def __init__(
        self,
        clock: FakeClock,
        error: Exception | None,
        starts: bool = True,
        silence_s: float = 0.0,
        address: str = "a",
    ) -> None:
        self.address = address
        self._clock = clock
        self._error = error
        self._starts = starts
        self.silence_s = silence_s
        self.queued: Queued | None = None
        self.started_s: float | None = None
        self.heard_s: float | None = None
        self.sparse: SparseReport | None = None
        self.num_cached_tokens = 0
        self.tile_tokens: int | None = None
        self.next_token_id: int | None = None
        self.ledger: TransferLedger | None = None
        self.was_cancelled = threading.Event()

    def run(self) -> None:
        self._clock.now_s += 3.0
        if self._starts:
            self.started_s = self._clock.now()
        self._clock.now_s += 2.0
        self.heard_s = self._clock.now() - self.silence_s
        assert self.ledger is not None
        layer, first_token = self.ledger.position
        self.ledger.admit(
            Arrival(
                transfer_id=self.ledger.transfer_id,
                epoch=self.ledger.epoch,
                layer=layer,
                first_token=first_token,
                num_tokens=TILE_TOKENS,
                payload_bytes=BYTES,
                effective_bytes=2 * BYTES,
            )
        )
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.was_cancelled.set()


class BlockedReceiver(ScriptedReceiver):
    """A receiver that ends only when the test lets it, even if it is cancelled."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock, None)
        self.may_end = threading.Event()

    def run(self) -> None:
        assert self.may_end.wait(LIMIT_S)


class Bench:
    """A fetcher over a test's own receivers and a pool that may refuse."""

    def __init__(self, receivers: Sequence[ScriptedReceiver | Exception], clock: FakeClock) -> None:
        self.clock = clock
        self.transfers: list[KvTransfer] = []
        self.known: dict[str, int] = {}
        """Nodes that the pool lends, and their streams."""
        self.preferred: list[str | None] = []
        self.refused_by: list[list[str]] = []
        self.epochs: list[int] = []
        self.positions: list[KvPosition] = []
        self.events: list[PrefillProgress | Queued] = []
        self.account = KvAccount()
        self.page_line = PageLine(PagePool(4), max_waiting=4)
        self.pages = self.reserve(4)
        self._script = list(receivers)
        self._next: ScriptedReceiver | None = None
        self.fetcher = KvFetcher(
            metrics=KvStreamMetrics(CollectorRegistry()),
            prefill_pool=self,
            receive=self._receive,
            page_line=self.page_line,
            fingerprint="f",
            num_layers=1,
            max_transfers=2,
            clock=clock,
            retry=AT_ONCE,
        )

    def reserve(self, num_pages: int) -> PageLease:
        reservation = self.page_line.reserve_now("r", PagesWanted(num_pages=num_pages))
        assert reservation is not None
        return reservation.lease

    def loads(self) -> dict[str, int]:
        return self.known

    @asynccontextmanager
    async def lease(
        self, *, num_tokens: int, beat: Beat, preferred: str | None, refused_by: Collection[str]
    ) -> AsyncIterator[PrefillLease]:
        assert num_tokens == NUM_TOKENS
        self.preferred.append(preferred)
        self.refused_by.append(list(refused_by))
        await beat(4)
        self.clock.now_s += 1.0
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        self._next = step
        yield PrefillLease(address=self._next.address, lease_id="l")

    def _receive(self, transfer: KvTransfer, _: PrefillLease) -> ScriptedReceiver:
        self.transfers.append(transfer)
        self.epochs.append(transfer.ledger.epoch)
        self.positions.append(transfer.ledger.position)
        assert self._next is not None
        self._next.ledger = transfer.ledger
        return self._next

    async def fetch(self, attention: AttentionMode = "dense", codec: KvCodec = "raw") -> None:
        assert self.pages is not None
        order = KvOrder(
            request_id="r",
            token_ids=np.arange(NUM_TOKENS),
            pages=self.pages,
            table_M=np.zeros(4, dtype=np.int32),
            attention=attention,
            codec=codec,
        )

        async def emit(event: PrefillProgress | Queued) -> None:
            self.events.append(event)

        await self.fetcher.fetch(order, self.account, emit)

    def next_at(self, *nodes: tuple[str, Exception | None] | Exception) -> None:
        """The next leases: of nodes that end with these errors, or none."""
        self._script = [
            node if isinstance(node, Exception) else ScriptedReceiver(self.clock, node[1], address=node[0])
            for node in nodes
        ]


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Bench]]:
    """Makes benches; in the end no thread receives and only the request holds pages."""
    made: list[Bench] = []

    def bench(*errors: Exception | None, refusals: Sequence[Exception] = ()) -> Bench:
        clock = FakeClock()
        made.append(Bench([*refusals, *(ScriptedReceiver(clock, error) for error in errors)], clock))
        return made[-1]

    yield bench
    for each in made:
        await each.fetcher.stop()
        await asyncio.sleep(0.01)
        assert each.pages is not None
        each.page_line.release(each.pages)
        assert each.page_line.pool.num_used == 0


async def test_one_attempt_is_enough_when_nothing_fails(make: Callable[..., Bench]) -> None:
    bench = make(None)
    await bench.fetch()
    (transfer,) = bench.transfers
    assert (bench.epochs, transfer.fingerprint) == ([1], "f")
    assert bench.account.num_kv_streams == 1
    assert bench.events[-1] == PrefillProgress(num_tokens_done=NUM_TOKENS, num_tokens_total=NUM_TOKENS)


async def test_requests_of_one_id_on_two_decode_nodes_are_two_transfers(make: Callable[..., Bench]) -> None:
    benches = [make(None) for _ in range(2)]
    for bench in benches:
        await bench.fetch()
    ids = [bench.transfers[0].ledger.transfer_id for bench in benches]
    assert len(set(ids)) == 2
    assert all(transfer_id.startswith("r.") for transfer_id in ids)


@pytest.mark.parametrize("kind", [PeerUnavailable, PeerFailed])
async def test_a_node_that_fails_is_replaced_under_a_new_epoch(
    make: Callable[..., Bench], kind: type[ColmError]
) -> None:
    """Bug: a MemoryError on one of two prefill nodes was INTERNAL to the client."""
    bench = make(kind("x"), kind("y"), None)
    await bench.fetch()
    assert bench.epochs == [1, 2, 3]
    assert bench.positions == [(0, 0), (0, TILE_TOKENS), (0, 2 * TILE_TOKENS)]
    assert len({transfer.ledger.transfer_id for transfer in bench.transfers}) == 1
    assert bench.account.num_kv_streams == 3
    assert bench.account.kv_received_bytes == 3 * BYTES
    assert bench.account.kv_effective_bytes == 6 * BYTES


@pytest.mark.parametrize("kind", [PeerUnavailable, PeerFailed])
async def test_the_last_failure_is_told_after_eight_attempts(make: Callable[..., Bench], kind: type[ColmError]) -> None:
    bench = make(*(kind(f"failure {number}") for number in range(1, 20)))
    with pytest.raises(kind, match="gave up after 8 attempts to prefill; the last: failure 8"):
        await bench.fetch()
    assert len(bench.transfers) == 8


@pytest.mark.parametrize("error", [FingerprintMismatch("other model"), ValueError("ours")])
async def test_what_another_node_would_not_mend_is_not_tried_again(
    make: Callable[..., Bench], error: Exception
) -> None:
    bench = make(error, None)
    with pytest.raises(type(error)):
        await bench.fetch()
    assert len(bench.transfers) == 1


async def test_what_one_node_has_no_room_for_is_asked_of_the_others_once_each(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.next_at(("a", CapacityExceeded("full a")), ("b", CapacityExceeded("full b")), ("c", None))
    await bench.fetch()
    assert bench.refused_by == [[], ["a"], ["a", "b"]]
    assert bench.epochs == [1, 2, 3]


async def test_the_last_refusal_of_a_node_is_passed_on_when_no_other_is_free(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.next_at(("a", CapacityExceeded("full a")), ("b", CapacityExceeded("full b")), CapacityExceeded("none free"))
    with pytest.raises(CapacityExceeded, match="full b"):
        await bench.fetch()
    assert len(bench.transfers) == 2


async def test_a_line_without_a_place_is_nobodys_refusal(make: Callable[..., Bench]) -> None:
    bench = make(None, refusals=[CapacityExceeded("too many wait")])
    with pytest.raises(CapacityExceeded, match="too many wait"):
        await bench.fetch()
    assert bench.transfers == []


async def test_a_node_that_fails_after_another_refused_is_tried_again(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.next_at(("a", CapacityExceeded("full a")), ("b", PeerUnavailable("died")), ("a", None))
    await bench.fetch()
    assert bench.refused_by == [[], ["a"], []]


async def test_a_prefill_nodes_lost_lease_is_not_told_as_one_of_this_node(make: Callable[..., Bench]) -> None:
    bench = make(*(LeaseExpired("gone") for _ in range(8)))
    with pytest.raises(PeerUnavailable) as caught:
        await bench.fetch()
    assert type(caught.value) is PrefillUnavailable


async def test_a_lease_that_cannot_be_had_is_asked_for_again_and_is_no_stream(make: Callable[..., Bench]) -> None:
    bench = make(None, refusals=[PeerUnavailable("died"), PeerUnavailable("died")])
    await bench.fetch()
    assert bench.account.num_kv_streams == 1
    assert bench.epochs == [1]


async def test_every_attempt_asks_for_the_same_attention_and_codec_and_the_last_one_says_what_became_of_it(
    make: Callable[..., Bench],
) -> None:
    """Dense and sparse tiles do not fit together above layer 0."""
    report = SparseReport(layers=(LayerRecall.of_dense(0, num_heads=4),))
    bench = make(PeerUnavailable("x"), None)
    last = bench._script[-1]
    assert isinstance(last, ScriptedReceiver)
    last.sparse = report
    await bench.fetch(attention="sparse", codec="int8")
    assert [(transfer.attention, transfer.codec) for transfer in bench.transfers] == [("sparse", "int8")] * 2
    assert bench.account.sparse == report


async def test_waiting_is_not_booked_as_prefill(make: Callable[..., Bench]) -> None:
    """Bug: queue_s was 0.000 and prefill_s 5.2 for a prompt of 0.01 s behind another one."""
    bench = make(None)
    await bench.fetch()
    assert bench.account.queue_s == pytest.approx(1.0 + 3.0)
    assert bench.account.prefill_s == pytest.approx(2.0)


async def test_a_stream_that_never_started_was_waiting_all_along(make: Callable[..., Bench]) -> None:
    bench = make(None)
    bench._script = [ScriptedReceiver(bench.clock, PeerUnavailable("x"), starts=False), *bench._script]
    await bench.fetch()
    assert bench.account.queue_s == pytest.approx(1.0 + 5.0 + 1.0 + 3.0)
    assert bench.account.prefill_s == pytest.approx(2.0)


async def test_the_node_that_holds_the_job_is_preferred_once(make: Callable[..., Bench]) -> None:
    bench = make(PeerUnavailable("x"), PeerUnavailable("y"), None)
    await bench.fetch()
    assert bench.preferred == [None, "a", None]


async def test_the_node_that_was_asked_for_the_same_beginning_is_preferred_unless_it_is_busy_or_gone(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    seen: list[str | None] = []
    for known in ({}, {"a": 0, "b": 0}, {"b": 0}, {"a": 9, "b": 0}):
        bench.known = known
        bench.next_at(("a", None))
        await bench.fetch()
        seen.append(bench.preferred[-1])
    assert seen == [None, "a", None, None]


async def test_no_node_is_preferred_for_a_sparse_prompt(make: Callable[..., Bench]) -> None:
    """Its keys and values follow from all of it: nothing of it is kept."""
    bench = make()
    bench.known = {"a": 0}
    for _ in range(2):
        bench.next_at(("a", None))
        await bench.fetch(attention="sparse")
    assert bench.preferred == [None, None]


async def test_a_node_that_fell_silent_is_not_preferred(make: Callable[..., Bench]) -> None:
    """It may have been stopped, and would be waited for once more."""
    bench = make(None)
    bench._script = [ScriptedReceiver(bench.clock, PeerUnavailable("x"), silence_s=5.0), *bench._script]
    await bench.fetch()
    assert bench.preferred == [None, None]


async def test_the_place_in_both_lines_is_passed_on(make: Callable[..., Bench]) -> None:
    bench = make()
    receiver = BlockedReceiver(bench.clock)
    receiver.queued = Queued(waits_for=WaitsFor.PREFILL_NODE, num_ahead=2, estimated_wait_s=7.5)
    bench._script = [receiver]
    fetching = asyncio.create_task(bench.fetch())
    async with asyncio.timeout(LIMIT_S):
        while len(bench.events) < 2:
            await asyncio.sleep(0.01)
    receiver.may_end.set()
    await fetching
    assert bench.events[:2] == [Queued(waits_for=WaitsFor.PREFILL_NODE, num_ahead=4), receiver.queued]


async def test_a_thread_holds_the_pages_until_it_has_ended_however_often_its_request_is_cancelled(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    receiver = BlockedReceiver(bench.clock)
    bench._script = [receiver]
    fetching = asyncio.create_task(bench.fetch())
    async with asyncio.timeout(LIMIT_S):
        while not bench.transfers:
            await asyncio.sleep(0.01)
    while not fetching.done():
        fetching.cancel()
        await asyncio.sleep(0)
    assert receiver.was_cancelled.is_set()
    bench.page_line.release(bench.pages)
    assert bench.page_line.pool.num_used == 4
    receiver.may_end.set()
    async with asyncio.timeout(LIMIT_S):
        while bench.page_line.pool.num_used:
            await asyncio.sleep(0.01)
    bench.pages = bench.reserve(1)
