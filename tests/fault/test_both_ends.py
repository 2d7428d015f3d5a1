"""Random schedules of faults, cancels and kills against both ends of the KV stream, with a clock that the test moves.

COLM_FAULTS=N tries N times as many schedules.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from colm.errors import CapacityExceeded, FingerprintMismatch, InvalidRequest, PeerUnavailable
from colm.kv import KvTile
from colm.metrics.kv_stream import KvStreamMetrics
from colm.wire import prompt_stream, tile_codec
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node import kv_requests, prefix_sender
from decode_node.kv_fetch import KvAccount, KvFetcher, KvOrder, KvTransfer, RetryPolicy
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease, PagePool
from decode_node.prefill_pool import PrefillLease, StaticPrefillPool
from decode_node.prefix_cache import PagesWanted
from prefill_node import prefill_job, prefix_uplink
from tests.both_ends import (
    FINGERPRINT,
    FORMAT,
    MAX_CONTEXT,
    VOCABULARY,
    ManualThreads,
    PrefillEnd,
    Wire,
    next_of,
    truth_of,
)
from tests.clock import FakeClock
from tests.gates import settle

PAGE_TOKENS = 4
NUM_PAGES = 12
LEASE_S, STALL_S = 20.0, 30.0
TILES = {"a": 5, "b": 3}
"""Tokens of a tile, by the address of a prefill node."""
WINDOW_BYTES = 400
"""Two tiles or three."""
LARGEST_TILE_BYTES = 5 * FORMAT.layer_token_bytes + 100
FAULTS = int(os.environ.get("COLM_FAULTS", "1"))
SELDOM = st.sampled_from([False, False, True])
LENGTHS = [1, 2, 5, 11, 16, MAX_CONTEXT]
WHOLE_TILES = 15
"""Tokens of whole tiles, at either node."""


@dataclass(eq=False)
class Request:
    """What a decode node wants, and what became of it."""

    token_ids: NDArray[np.int64]
    pages: PageLease
    table_M: NDArray[np.int32]
    first_token: int = 0
    """What lies before it is in the pages from the start."""
    account: KvAccount = field(default_factory=KvAccount)
    task: "asyncio.Task[None] | None" = None
    last_token_id: int | None = None
    """The token behind the prompt, if chain 1's next one is wanted."""
    told: list[int] = field(default_factory=list)
    """What was said of that."""
    is_whole: bool = False
    """It ended well; its pages are read and given back when the machine says so."""


class BothEnds(RuleBasedStateMachine):
    """One decode node and two prefill nodes, of which each may be killed and started again."""

    lengths: ClassVar = LENGTHS
    holds_prefix: ClassVar = st.booleans()

    def __init__(self) -> None:
        super().__init__()
        self.events = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prefill_job, "WINDOW_BYTES", WINDOW_BYTES)
        self.patch.setattr(kv_requests, "ACKNOWLEDGE_BYTES", 1)
        # A tile at a time comes up, two tokens a message, however slow streams were.
        self.patch.setattr(prefix_uplink, "WINDOW_BYTES", 1)
        self.patch.setattr(prefix_sender, "_MESSAGE_BYTES", 2 * FORMAT.layer_token_bytes)
        self.patch.setattr(prefix_uplink, "FLOOR_BYTES_S", 1e15)
        # The fake clock does not move these, and a busy machine is slow.
        for name in ("OPEN_TIMEOUT_S", "UPLOAD_IDLE_S"):
            self.patch.setattr(prompt_stream, name, 1e6)
        self.names = count()
        self.clock = FakeClock()
        self.wires: list[Wire] = []
        self.requests: list[Request] = []
        self.changed: set[str] = set()
        """Requests of whose streams a message came as another one."""
        self.layout = KvLayout(FORMAT, PAGE_TOKENS)
        self.store = KvStore(self.layout, NUM_PAGES)
        self.page_line = PageLine(PagePool(NUM_PAGES), max_waiting=0)

    @initialize()
    def start(self) -> None:
        async def start() -> None:
            self.nodes = {address: self.prefill_end(address) for address in TILES}
            self.pool = StaticPrefillPool(list(TILES), self.clock, max_streams=3)
            self.fetcher = KvFetcher(
                metrics=KvStreamMetrics(CollectorRegistry()),
                prefill_pool=self.pool,
                receive=self.receive,
                page_line=self.page_line,
                fingerprint=FINGERPRINT,
                num_layers=FORMAT.num_layers,
                max_transfers=1,
                clock=self.clock,
                retry=RetryPolicy(max_attempts=4, first_pause_s=0.0, last_pause_s=0.0),
            )
            self.fetcher._threads.shutdown()
            self.fetcher._threads = self.threads = ManualThreads()  # type: ignore[assignment]

        self.events.run_until_complete(start())

    def prefill_end(self, address: str) -> PrefillEnd:
        return PrefillEnd(self.clock, tile_tokens=TILES[address], lease_s=LEASE_S, stall_s=STALL_S)

    def receive(self, transfer: KvTransfer, lease: PrefillLease) -> Wire:
        wire = Wire(transfer, lease, self.store, self.clock, self.nodes[lease.address])
        self.wires.append(wire)
        return wire

    def settle(self, act: Callable[[], object] = lambda: None) -> None:
        async def acting() -> None:
            act()
            await settle()
            for wire in self.wires:
                if wire.thread is None and self.threads.waiting:
                    (future, _) = self.threads.waiting.pop(0)
                    wire.thread = future
            await settle()

        self.events.run_until_complete(acting())

    def open_wires(self) -> list[Wire]:
        return [wire for wire in self.wires if wire.is_open]

    # The decode node's callers.

    @rule(
        data=st.data(),
        of_tiles=st.sampled_from(sorted(TILES.values())),
        document=st.integers(0, 2),
        salt=st.sampled_from([b"", b"s"]),
        last_token_id=st.none() | st.integers(0, VOCABULARY - 1),
    )
    def ask(self, data: st.DataObject, of_tiles: int, document: int, salt: bytes, last_token_id: int | None) -> None:
        length = data.draw(st.sampled_from(self.lengths))
        holds_prefix = data.draw(self.holds_prefix)
        reservation = self.page_line.reserve_now("r", PagesWanted(num_pages=self.layout.pages(length)))
        if reservation is None:
            return
        pages = reservation.lease
        number = next(self.names)
        # Prompts of the same document begin alike.
        token_ids = np.random.default_rng(document).integers(0, 320, length)
        table_M = self.store.page_table(pages)
        first_token = WHOLE_TILES if holds_prefix and length > WHOLE_TILES else 0
        has_room = length < MAX_CONTEXT
        request = Request(token_ids, pages, table_M, first_token, last_token_id=last_token_id if has_room else None)
        # Others' keys and values lie in the pages, and must not be taken for the prompt's.
        self.store.k_pages_LBPKD[:, table_M] = self.store.v_pages_LBPKD[:, table_M] = -1.0
        if first_token:
            for layer, both in enumerate(truth_of(token_ids)[:, :, :, :first_token]):
                self.store.write(table_M, KvTile(layer, 0, *both))

        async def tell(token_id: int) -> None:
            assert request.task is not None
            assert not request.task.done()
            request.told.append(token_id)

        order = KvOrder(
            request_id=str(number),
            token_ids=token_ids,
            pages=pages,
            table_M=table_M,
            first_token=first_token,
            tile_tokens=of_tiles,
            cache_salt=salt,
            last_token_id=request.last_token_id,
            on_next_token=tell,
        )

        async def nobody(_: object) -> None:
            pass

        async def fetch() -> None:
            try:
                await self.fetcher.fetch(order, request.account, nobody)
                request.is_whole = True
            except (PeerUnavailable, CapacityExceeded, asyncio.CancelledError):
                self.page_line.release(pages)
            except (FingerprintMismatch, InvalidRequest):  # what a header or a request said was not what was sent
                self.page_line.release(pages)
                if order.request_id not in self.changed:
                    raise

        def begin() -> None:
            request.task = asyncio.ensure_future(fetch())

        self.requests.append(request)
        self.settle(begin)

    @precondition(lambda self: any(request.is_whole for request in self.requests))
    @rule()
    def decode_and_release(self) -> None:
        request = next(each for each in self.requests if each.is_whole)
        self.check_pages(request)
        self.requests.remove(request)
        self.settle(lambda: self.page_line.release(request.pages))

    @precondition(lambda self: any(not request.task.done() for request in self.requests))
    @rule(data=st.data(), is_meant=SELDOM)
    def cancel(self, data: st.DataObject, is_meant: bool) -> None:
        request = data.draw(st.sampled_from([each for each in self.requests if each.task and not each.task.done()]))
        if is_meant:
            self.settle(request.task.cancel)  # type: ignore[union-attr]

    # The way of the messages.

    @precondition(lambda self: bool(self.due()))
    @rule(numbers=st.lists(st.integers(0, 11), min_size=1, max_size=30))
    def go_on(self, numbers: list[int]) -> None:
        """Do some of what is due, in an order that is drawn: messages up and down, steps of engines, ends of calls."""
        for number in numbers:
            if due := self.due():
                self.settle(due[number % len(due)])

    @precondition(lambda self: bool(self.due()))
    @rule(num_deeds=st.integers(1, 60))
    def go_straight_on(self, num_deeds: int) -> None:
        """Do what is due, first come, first served."""
        for _ in range(num_deeds):
            if due := self.due():
                self.settle(due[0])

    @precondition(lambda self: any(wire.is_at_prompt for wire in self.wires))
    @rule()
    def damage_a_prompt(self) -> None:
        wire = next(wire for wire in self.wires if wire.is_at_prompt)

        def damage(request: pb.PullKvRequest) -> None:
            request.token_ids.ids[0] ^= 1

        self.settle(lambda: wire.say(damage))

    @precondition(lambda self: any(wire.brings_up for wire in self.wires))
    @rule(fault=st.sampled_from(["flip", "place", "epoch", "not finite", "lose", "repeat", "end"]))
    def bring_up_spoilt(self, fault: str) -> None:
        """The prefill node computes instead, and nobody is given what came up wrong."""
        wire = next(wire for wire in self.wires if wire.brings_up)

        def spoil(request: pb.PullKvRequest) -> list[pb.PullKvRequest]:
            held = request.held_tile
            match fault:
                case "flip":
                    held.payload = bytes([held.payload[0] ^ 1]) + held.payload[1:]
                case "place":
                    held.tile.first_token += 1
                case "epoch":
                    held.tile.epoch += 1
                case "not finite":
                    held.payload = np.full(len(held.payload) // 4, np.nan, dtype=np.float32).tobytes()
                    held.tile.checksum = xxhash.xxh3_64_intdigest(held.payload)
                case "lose":
                    return []
                case "repeat":
                    return [request, request]
                case "end":
                    return [pb.PullKvRequest(held_end=pb.HeldEnd())]
            tile_codec.seal(held.tile)
            return [request]

        self.settle(lambda: wire.bring_up(spoil))

    @precondition(lambda self: any(wire.coming for wire in self.open_wires()))
    @rule(data=st.data(), fault=st.sampled_from(["flip", "truncate", "lose", "repeat", "swap", "replay"]))
    def bring_spoilt(self, data: st.DataObject, fault: str) -> None:
        wire = data.draw(st.sampled_from([wire for wire in self.open_wires() if wire.coming]))
        message = wire.take()
        match fault:
            case "flip" if message:
                at = data.draw(st.integers(0, len(message) - 1))
                spoilt = [message[:at] + bytes([message[at] ^ 1 << data.draw(st.integers(0, 7))]) + message[at + 1 :]]
                self.changed.add(wire.request_id)
            case "truncate":
                spoilt = [message[: data.draw(st.integers(0, max(0, len(message) - 1)))]]
                self.changed.add(wire.request_id)
            case "repeat":
                spoilt = [message, message]
            case "swap" if wire.coming:
                spoilt = [wire.take(), message]
            case "replay":
                late = [tile for other in self.wires for tile in other.sent]
                spoilt = [data.draw(st.sampled_from(late)), message] if late else [message]
            case _:
                spoilt = []
        for each in spoilt:
            if wire.is_open:
                self.settle(lambda each=each: wire.bring(each))  # type: ignore[misc]

    @precondition(lambda self: bool(self.open_wires()))
    @rule(data=st.data())
    def lose_a_connection(self, data: st.DataObject) -> None:
        self.settle(data.draw(st.sampled_from(self.open_wires())).lose)

    # The prefill nodes.

    @rule(address=st.sampled_from(sorted(TILES)), is_meant=SELDOM)
    def kill_and_start_again(self, address: str, is_meant: bool) -> None:
        def kill() -> None:
            node, self.nodes[address] = self.nodes[address], self.prefill_end(address)
            node.die()
            for wire in self.wires:
                if wire.node is node:
                    wire.notice()

        if is_meant:
            self.settle(kill)

    @rule(seconds=st.sampled_from([0.5, LEASE_S, STALL_S, 10 * STALL_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.settle(lambda: [node.loop.look_again() for node in self.nodes.values()])

    # What must hold.

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "nodes"):
            return
        self.page_line.pool.check_integrity()
        for node in self.nodes.values():
            # The engine and the thread of kept tiles may each make a tile that fills the window.
            node.check_integrity(WINDOW_BYTES + 2 * LARGEST_TILE_BYTES)
        for wire in self.wires:
            if wire.handler.done() and not wire.handler.cancelled():
                wire.handler.result()
        for request in self.requests:
            last = request.last_token_id
            assert request.told in ([], [] if last is None else [next_of(request.token_ids, last)]), "at most one"
            if request.task is not None and request.task.done():
                request.task.result()
            if request.is_whole:
                self.check_pages(request)
        self.requests = [each for each in self.requests if each.is_whole or not each.task.done()]  # type: ignore[union-attr]

    def check_pages(self, request: Request) -> None:
        """The pages that decode would read hold the prompt's keys and values, and each byte has moved once."""
        num_tokens = len(request.token_ids)
        assert request.account.kv_received_bytes == (num_tokens - request.first_token) * FORMAT.token_bytes
        for index, pages in enumerate((self.store.k_pages_LBPKD, self.store.v_pages_LBPKD)):
            rows_LTKD = pages[:, request.table_M].flatten(1, 2)[:, :num_tokens]
            assert torch.equal(rows_LTKD.swapaxes(1, 2), truth_of(request.token_ids)[:, index])

    def teardown(self) -> None:
        try:
            if hasattr(self, "nodes"):
                self.run_to_the_end()
        finally:
            self.events.close()
            self.patch.undo()

    def run_to_the_end(self) -> None:
        """Without further faults every request ends, and then nothing is held anywhere."""
        num_deeds = 0
        while (due := self.due()) or any(request.task and not request.task.done() for request in self.requests):
            if due:
                self.settle(due[0])
            else:
                self.time_passes(STALL_S)
            num_deeds += 1
            assert num_deeds < 3000, "it does not end"
        self.nothing_is_lost()
        assert not [request for request in self.requests if not request.is_whole]
        while self.requests:
            self.decode_and_release()
        self.clock.now_s += 100 * STALL_S
        self.settle(lambda: [node.loop.look_again() for node in self.nodes.values()])
        while work := [each for node in self.nodes.values() for each in node.work_that_waits]:  # of what was given up
            self.settle(work[0])
        assert self.page_line.pool.num_used == 0
        assert [node.num_streams for node in self.pool._nodes] == [0, 0]
        assert not self.threads.waiting
        for node in self.nodes.values():
            assert not node.loop._jobs
            assert (node.loop.load.num_active, node.loop.load.num_queued) == (0, 0)
        left = asyncio.all_tasks(self.events)
        assert not left, left

    def due(self) -> list[Callable[[], object]]:
        """What either end or the network can do next."""
        deeds: list[Callable[[], object]] = []
        for wire in self.wires:
            if wire.is_open and wire.coming:
                deeds.append(wire.bring_next)
            if wire.may_say:
                deeds.append(wire.say)
            if wire.may_end:
                deeds.append(wire.end)
            if not wire.is_open and not wire.handler.done():
                deeds.append(wire.notice)
        return deeds + [work for node in self.nodes.values() for work in node.work_that_waits]


BothEnds.TestCase.settings = settings(
    max_examples=50 * FAULTS,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestBothEnds = BothEnds.TestCase


class BothEndsOfPrefixes(BothEnds):
    """The decode node holds the beginning of every prompt; either prefill node may ask for it."""

    lengths = (16, 20, MAX_CONTEXT)
    holds_prefix = st.just(True)


BothEndsOfPrefixes.TestCase.settings = settings(BothEnds.TestCase.settings, max_examples=20 * FAULTS)
TestBothEndsOfPrefixes = BothEndsOfPrefixes.TestCase
