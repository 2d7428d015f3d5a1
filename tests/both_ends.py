"""Both ends of the KV stream without sockets, threads or a model: whoever holds them says what happens next.

All but gRPC, the engine and the threads is real: `PrefillService`, `PrefillLoop` and jobs there; `KvFetcher`,
`KvReceiver`, ledger, pages and store here. A `Wire` stands for one call between the two.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, cast

import grpc
import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor

from colm.clock import Clock
from colm.errors import ColmError, PeerUnavailable
from colm.flops import LayerFlops
from colm.kv import KvFormat, KvTile
from colm.kv_position import KV_START, KvPosition
from colm.metrics.kv_stream import KvStreamMetrics
from colm.wire.status import error_of
from colm.wire.tile_codec import decode_message
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_receiver import KvReceiver
from decode_node.kv_store import KvStore
from decode_node.prefill_pool import PrefillLease
from prefill_node.cost_model import CostModel, PrefillShape
from prefill_node.prefill_loop import PrefillLoop
from prefill_node.prefill_run import PrefillRun
from prefill_node.prefix_cache import KeptTile, PrefixCache
from prefill_node.service import PrefillService

FORMAT = KvFormat(num_layers=2, num_kv_heads=2, head_dim=2, dtype=torch.float32)
END = KvPosition(FORMAT.num_layers, 0)
FINGERPRINT = "f"
MAX_CONTEXT = 32
VOCABULARY = 320
JOB_BYTES = 1000
"""Of a prompt, whatever its length."""
CACHE_BYTES = 40 * FORMAT.token_bytes
"""Of a prefill node, for what it has computed."""
MESSAGES_ON_THE_WAY = 2
"""What the network holds of a call before the sender waits."""


def truth_of(token_ids: NDArray[np.int64]) -> Tensor:
    """Keys and values of a prompt, (layer, k or v, kv head, token, dim), which depend on the ids up to their token."""
    prefix = np.cumsum(token_ids + 1) % 9973
    place = np.arange(FORMAT.num_layers * 2 * FORMAT.num_kv_heads * FORMAT.head_dim).reshape(
        FORMAT.num_layers, 2, FORMAT.num_kv_heads, 1, FORMAT.head_dim
    )
    return torch.from_numpy((prefix[:, None] + 10_000 * (place + 1)).astype(np.float32))


def next_of(token_ids: NDArray[np.int64], last_token_id: int) -> int:
    """What follows a prompt and the token behind it."""
    return int(np.append(token_ids, last_token_id).cumsum()[-1] % VOCABULARY)


class ManualThreads:
    """An executor whose work is done when its holder says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: work(*arguments)))
        return future

    def work(self) -> None:
        """Do the oldest work that waits."""
        future, work = self.waiting.pop(0)
        future.set_result(work())

    def shutdown(self) -> None:
        assert not self.waiting


class TableEngine:
    """Looks keys and values up instead of computing them."""

    kv_format = FORMAT

    def __init__(self, tile_tokens: int) -> None:
        self.config = type("Config", (), {"max_context": MAX_CONTEXT, "vocab_size": VOCABULARY})
        self.tile_tokens = tile_tokens
        self.num_computed: dict[PrefillRun, int] = {}
        """Tokens of layers; a job has one run."""

    def check(self, _: NDArray[np.int64]) -> None:
        pass

    def memory_bytes(self, *_: object, **__: object) -> int:
        return JOB_BYTES

    def pack_bytes(self, _: int) -> int:
        return 0

    def begin(
        self,
        token_ids: NDArray[np.int64],
        *,
        sparse: None,
        cancelled: Any,
        prefix: Sequence[KeptTile],
        last_token_id: int | None,
    ) -> PrefillRun:
        return PrefillRun(
            token_ids,
            num_layers=FORMAT.num_layers,
            tile_tokens=self.tile_tokens,
            sparse=sparse,
            cancelled=cancelled,
            prefix=prefix,
            last_token_id=last_token_id,
        )

    def step(self, runs: Sequence[PrefillRun]) -> list[KvTile | None]:
        tiles = [self._step(run) for run in runs]
        for run in runs:
            if run.is_over and run.last_token_id is not None:
                run.next_token_id = next_of(run.token_ids, run.last_token_id)
        return tiles

    def _step(self, run: PrefillRun) -> KvTile | None:
        with run.own_errors():
            run.cancelled.raise_if_set()
            if run.is_kept:
                run.after_kept()
                return KvTile(run.layer, 0, *truth_of(run.token_ids)[0, :, :, :0])
            layer, first, last = run.layer, run.start, run.stop
            k_KTD, v_KTD = truth_of(run.token_ids)[layer, :, :, first:last]
            run.after_keys_values()
            run.due = None
            computed = self.num_computed.get(run, 0) + last - first
            num_new = run.num_tokens - run.num_cached_tokens
            assert computed <= FORMAT.num_layers * num_new, "computed twice for one job"
            self.num_computed[run] = computed
            return KvTile(layer, first, k_KTD, v_KTD)
        return None


class PrefillEnd:
    """A prefill node; `die` is what a killed process leaves: nothing."""

    def __init__(self, clock: Clock, *, tile_tokens: int, lease_s: float, stall_s: float) -> None:
        shape = PrefillShape(
            layer=LayerFlops(keys_values=1, rest=1), num_layers=2, num_heads=1, head_dim=2, tile_tokens=tile_tokens
        )
        self.engine = cast(Any, TableEngine(tile_tokens))
        self.loop = PrefillLoop(
            self.engine,
            CostModel(shape=shape, linear_flop_s=0.0, attention_flop_s=0.0, step_s=1.0),
            clock,
            max_queued=2,
            max_queued_s=1e6,
            memory_bytes=5 * JOB_BYTES,
            lease_s=lease_s,
            stall_s=stall_s,
            prefixes=PrefixCache(FORMAT, tile_tokens=tile_tokens, budget_bytes=CACHE_BYTES, fingerprint=FINGERPRINT),
        )
        self.threads = [ManualThreads(), ManualThreads()]
        """The engine's, and that of kept tiles."""
        self.loop._executor, self.loop._kept._executor = self.threads  # type: ignore[assignment]
        self.service = PrefillService(
            self.engine,
            self.loop,
            fingerprint=FINGERPRINT,
            planner=cast(Any, None),
            metrics=KvStreamMetrics(CollectorRegistry()),
            takes_prefixes=True,
        )
        self.wires: list[Wire] = []

    @property
    def work_that_waits(self) -> list[Callable[[], None]]:
        """In either thread, what it would do next."""
        return [thread.work for thread in self.threads if thread.waiting]

    def die(self) -> None:
        for wire in list(self.wires):
            wire.lose()
        self.loop._has_stopped = True
        self.loop._jobs.clear()
        if self.loop._timer is not None:
            self.loop._timer.cancel()

    def check_integrity(self, window_bytes: int) -> None:
        for job in self.loop._jobs.values():
            job.check_integrity()
            assert job.window_bytes <= window_bytes
        jobs = {*self.loop._jobs.values(), *self.loop._stepping, self.loop._kept.reading} - {None}
        self.loop.prefixes.check_integrity([job.hold for job in jobs])


class _Status(grpc.RpcError):  # type: ignore[misc]  # grpc is untyped here
    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any) -> None:
        self.code, self.details, self.trailing_metadata = lambda: code, lambda: details, lambda: metadata


class Wire:
    """One call, seen from both ends. A `Receiver` for the fetcher, a context for the service.

    Up go whole messages, at `say`; down they wait in `coming` until they are taken. The prefill node may notice later
    than the decode node that the call is lost.
    """

    def __init__(
        self, transfer: KvTransfer, lease: PrefillLease, store: KvStore, clock: Clock, node: PrefillEnd
    ) -> None:
        self.request_id = transfer.ledger.transfer_id.partition(".")[0]
        self.node = node
        self.thread: Future[Any] | None = None
        """Ends when the decode node has done with the call."""
        self.coming: list[bytes] = []
        self.sent: list[bytes] = []
        """All tiles that the prefill node sent."""
        self.status: ColmError | None = None
        """With which the prefill node has ended the call; None for OK or not yet."""
        self.resume_from = KV_START
        self._num_said = 0
        self._receiver = KvReceiver(transfer, lease, store, cast(Any, None), cast(Any, None), clock)
        self._receiver._break_off = self.lose  # type: ignore[method-assign]
        self._requests = self._receiver._requests
        self._words = iter(self._requests)
        self._heard: asyncio.Queue[pb.PullKvRequest | None] = asyncio.Queue()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self.handler = asyncio.ensure_future(self._serve())
        node.wires.append(self)

    # What the fetcher reads and calls.

    def __getattr__(self, name: str) -> Any:
        if name in ("queued", "started_s", "heard_s", "sparse", "num_cached_tokens", "tile_tokens", "next_token_id"):
            return getattr(self._receiver, name)
        raise AttributeError(name)

    def run(self) -> None:
        raise AssertionError("the holder of the wire does what the thread would")

    def cancel(self) -> None:
        with self._receiver._lock:
            self._receiver._cancelled = True
        if not self._requests.give_up():
            self.lose()

    # What the prefill node sees.

    async def _serve(self) -> None:
        with suppress(grpc.aio.AbortError):
            await self.node.service.pull_kv(self._hear(), cast(Any, self))

    async def _hear(self) -> AsyncIterator[pb.PullKvRequest]:
        while (request := await self._heard.get()) is not None:
            if request.WhichOneof("part") == "open":
                position = request.open.resume_from
                self.resume_from = KvPosition(position.layer, position.token)
            yield request

    async def send_initial_metadata(self, metadata: Any) -> None:
        pass

    async def write(self, message: bytes) -> None:
        header, _ = decode_message(message)
        if header.WhichOneof("event") == "tile":
            tile = header.tile
            assert (tile.layer, tile.first_token) >= self.resume_from, "moved again after a resume"
            self.sent.append(message)
        await self._has_room.wait()
        self.coming.append(message)
        if len(self.coming) >= MESSAGES_ON_THE_WAY:
            self._has_room.clear()

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Any) -> None:
        assert code is not grpc.StatusCode.INTERNAL, details
        self.status = error_of(_Status(code, details, metadata), "prefill node")
        raise grpc.aio.AbortError

    # What whoever holds the wire does.

    @property
    def is_open(self) -> bool:
        """The decode node has not done with the call."""
        return self.thread is not None and not self.thread.done()

    @property
    def may_say(self) -> bool:
        """The decode node has something to say."""
        r = self._requests
        return self.is_open and (
            self._num_said < 3
            or (self._num_said < 1000 and (r._stored != r._said or r._is_given_up or r._is_closed or r._sends_held))
        )

    @property
    def brings_up(self) -> bool:
        """The decode node's next message holds a piece of the prompt's beginning."""
        return self.is_open and 3 <= self._num_said < 1000 and self._requests._sends_held and not self._has_given_up

    @property
    def _has_given_up(self) -> bool:
        return self._requests._is_given_up

    def bring_up(self, change: Callable[[pb.PullKvRequest], list[pb.PullKvRequest]]) -> None:
        """Bring other messages to the prefill node than the decode node's next one."""
        for request in change(next(self._words)):
            self._num_said += 1
            self._heard.put_nowait(request)

    def say(self, change: Callable[[pb.PullKvRequest], None] = lambda _: None) -> None:
        """Bring the decode node's next message to the prefill node."""
        if (request := next(self._words, None)) is None:
            self._num_said = 1000
            self._heard.put_nowait(None)
            return
        self._num_said += 1
        if request.WhichOneof("part") == "give_up":
            self._num_said = 1000
        change(request)
        self._heard.put_nowait(request)

    @property
    def is_at_prompt(self) -> bool:
        """The decode node's next message holds the ids."""
        return self.is_open and self._num_said == 1

    def bring_next(self) -> None:
        """Let the decode node read the oldest message on the way."""
        self.bring(self.take())

    def take(self) -> bytes:
        message = self.coming.pop(0)
        self._has_room.set()
        return message

    def bring(self, message: bytes) -> None:
        """Let the decode node read one message."""
        try:
            if self._receiver._receive(iter([message])):
                self._requests.close()
        except ColmError as error:
            self._end(error)

    @property
    def may_end(self) -> bool:
        """The prefill node has ended the call, and the decode node has read all."""
        return self.is_open and self.handler.done() and not self.coming

    def end(self) -> None:
        """Let the decode node see the end of the call."""
        if self._requests._is_closed and not self._receiver._cancelled:
            self._end(None)  # all had come: how the call ends no longer matters
        else:
            self._end(self.status or PeerUnavailable("ended the KV stream before it was complete"))

    def lose(self) -> None:
        """Break the connection; the decode node sees it at once, the prefill node when `notice` says so."""
        self._end(PeerUnavailable("lost"))

    def notice(self) -> None:
        """Let the prefill node see that the call is over."""
        self.handler.cancel()
        if self in self.node.wires:
            self.node.wires.remove(self)

    def _end(self, error: ColmError | None) -> None:
        if not self.is_open:
            return
        assert self.thread is not None
        self._requests.close()
        self._has_room.set()
        if error is None:
            self.thread.set_result(None)
        else:
            self.thread.set_exception(error)
