"""The reference: one process that prefills and decodes, with the engines, the pages and the gateway of the cluster.

One thread computes, so nothing of a prompt overlaps with anything of an answer. Prompts are taken first come, first
served, each whole, up to its first token, and all that wait before the answers go on: as servers without disaggregation
or chunked prefill do. What the thread makes goes to the client through the gateway's own front door and gRPC service,
in the same process.

Shapes: N prompt tokens, M pages of a request.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter

import grpc
from colm_kernels.native import CancelFlag, Cancelled
from prometheus_client import CollectorRegistry

from cluster.accounts import Accounts
from cluster.client_requests import ClientRequests
from cluster.client_tokens import Clients
from cluster.front_door.front_door import FrontDoor
from cluster.front_door.placement import DecodeJob, DecodeLease
from cluster.front_door.plan import GatewayLimits, ServedModel
from cluster.generation_service import GenerationService
from cluster.metrics import RequestMetrics
from cluster.node_registry import NodeRegistry
from cluster.options import ClusterConfig
from colm.checkpoint import Checkpoint
from colm.clock import Deadline, MonotonicClock
from colm.dtypes import parse_dtype
from colm.errors import CapacityExceeded, ColmError, InvalidRequest, UnknownAnswer
from colm.events import Event, Finished, Timings, Usage
from colm.kv import KvFormat, fingerprint
from colm.line import Beat
from colm.scale import Changing, Scale
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import bind, create_server, dial_address
from colm.wire.security import Security
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.page_pool import PageLease, PagePool
from decode_node.plan import StepPlan
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import choose
from prefill_node.engine import PrefillEngine

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Work:
    """A request. The thread owns it; others may only set the flag."""

    job: DecodeJob
    emit: Callable[[Event | Exception], None]
    arrived_s: float
    cancelled: CancelFlag = field(default_factory=CancelFlag)
    pages: PageLease | None = None
    answer: RunningAnswer | None = None
    started_s: float = 0.0
    prefilled_s: float = 0.0
    first_token_s: float = 0.0


class OneProcess:
    """Both engines and the one thread that runs them. `DecodeNodeCalls` for the front door.

    Args:
        checkpoint: the model; the engines hold what each needs of it.
        kv_format: of keys and values, and the dtype of all.
        config: the cluster's; sizes of tiles, pages, cache, batch and line are those of its nodes.
    """

    def __init__(self, checkpoint: Checkpoint, kv_format: KvFormat, config: ClusterConfig) -> None:
        settings = config.decode
        layout = KvLayout(kv_format, settings.page_tokens)
        self._store = KvStore(layout, layout.pages_within(settings.kv_cache_bytes))
        self._prefill = PrefillEngine(checkpoint, kv_format, tile_tokens=config.prefill.tile_tokens)
        self._decode = DecodeEngine(checkpoint, self._store)
        self._tokenizer = Tokenizer.load(checkpoint)
        self._eos_token_ids = checkpoint.text.eos_token_ids
        self._max_batch_size, self._max_requests = settings.max_batch_size, settings.max_requests
        self.pool = PagePool(self._store.num_pages)
        self._changed = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._running: list[_Work] = []
        self._stops = False
        self._thread = threading.Thread(target=self._run, name="one-process", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it computes now."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join()

    def leave_answers(self) -> None:
        """No answer outlives its call here."""

    async def resume(
        self,
        address: str,  # noqa: ARG002
        answer_key: str,  # noqa: ARG002
        num_tokens: int,  # noqa: ARG002
        *,
        scale: Changing[Scale | None],  # noqa: ARG002
        deadline: Deadline,  # noqa: ARG002
    ) -> AsyncGenerator[Event]:
        """Holds no answer whose reader has left."""
        raise UnknownAnswer("an answer ends with its call")
        yield

    async def decode(
        self,
        lease: DecodeLease,  # noqa: ARG002 - there is no other node
        job: DecodeJob,
        *,
        only_if_room: bool,  # noqa: ARG002
        deadline: Deadline,  # noqa: ARG002 - the front door cancels
    ) -> AsyncGenerator[Event]:
        """See `DecodeNodeCalls`."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | Exception]()

        def emit(event: Event | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = _Work(job=job, emit=emit, arrived_s=perf_counter())
        self._submit(work)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            work.cancelled.set()
            with self._changed:
                self._changed.notify()

    def _submit(self, work: _Work) -> None:
        if (needed := self._num_pages(work)) > self.pool.num_pages:
            limit = f"needs {needed} KV pages with its prompt, and there are {self.pool.num_pages}; shorten either"
            raise InvalidRequest("max_new_tokens", work.job.max_new_tokens, limit)
        with self._changed:
            if len(self._waiting) + len(self._running) >= self._max_requests:
                raise CapacityExceeded(f"{self._max_requests} requests are here already; try again later")
            self._waiting.append(work)
            self._changed.notify()

    def _num_pages(self, work: _Work) -> int:
        return self._store.layout.pages(len(work.job.token_ids) + work.job.max_new_tokens)

    def _run(self) -> None:
        try:
            while self._has_work():
                if (work := self._next()) is not None:
                    self._begin(work)
                elif self._running:
                    self._step(self._running)
        except Exception as err:
            logger.exception("one_process.failed")
            with self._changed:
                left = [*self._waiting, *self._running]
            for work in left:
                work.emit(err)

    def _has_work(self) -> bool:
        """Wait for some; False at the end. Whoever was cancelled is out."""
        with self._changed:
            self._changed.wait_for(lambda: self._stops or self._waiting or self._running)
            self._waiting = deque(work for work in self._waiting if not work.cancelled.is_set())
        for work in [work for work in self._running if work.cancelled.is_set()]:
            self._end(work)
        return not self._stops

    def _next(self) -> _Work | None:
        """The one that came first, if the batch and the pages have room for it."""
        with self._changed:
            if not self._waiting or len(self._running) >= self._max_batch_size:
                return None
            work = self._waiting[0]
            work.pages = self.pool.reserve(work.job.request_id, self._num_pages(work))
            if work.pages is None:
                return None
            self._running.append(self._waiting.popleft())
            return work

    def _begin(self, work: _Work) -> None:
        """Prefill a whole prompt, and make its first token."""
        assert work.pages is not None
        job, table_M = work.job, self._store.page_table(work.pages)
        work.started_s = perf_counter()
        try:
            if len(job.token_ids) > 1:
                for tile in self._prefill.run(job.token_ids[:-1], cancelled=work.cancelled):
                    self._store.write(table_M, tile)
        except (Cancelled, ColmError) as err:
            self._end(work, err)
            return
        work.prefilled_s = perf_counter()
        eos_token_ids = () if job.sampling.ignore_eos else self._eos_token_ids
        work.answer = RunningAnswer(
            unread_token_ids=job.token_ids[-1:].tolist(),
            position=len(job.token_ids) - 1,
            num_chains=job.scale.value.num_chains,
            max_new_tokens=job.max_new_tokens,
            table_M=table_M,
            sampling=job.sampling,
            stop_token_ids={*eos_token_ids, *job.sampling.stop_token_ids},
            text_stream=None if self._tokenizer is None else self._tokenizer.stream(),
        )
        self._step([work])

    def _step(self, batched: Sequence[_Work]) -> None:
        """One token for each of these answers."""
        batch = [(work, work.answer) for work in batched if work.answer is not None]
        batch.sort(key=lambda each: each[0].job.scale.value.num_chains, reverse=True)
        plan = StepPlan(tuple(row for _, answer in batch for row in answer.next_rows()))
        positions_Q = [position for row in plan.rows for position in row.chosen_positions]
        choices = choose([answer.sampler for _, answer in batch], positions_Q, self._decode.step(plan))
        now_s = perf_counter()
        for (work, answer), choice in zip(batch, choices, strict=True):
            if isinstance(choice, ColmError):
                self._end(work, choice)
                continue
            work.first_token_s = work.first_token_s or now_s
            for token in answer.advance([choice]):
                work.emit(token)
            if answer.finish_reason is not None:
                self._end(work, _finished(work, answer, now_s))

    def _end(self, work: _Work, last: Event | Exception | None = None) -> None:
        """Let go of what a request holds, and then say so: who has the last event may count on it."""
        assert work.pages is not None
        self.pool.release(work.pages)
        with self._changed:
            self._running.remove(work)
        if last is not None:
            work.emit(last)


def _finished(work: _Work, answer: RunningAnswer, now_s: float) -> Finished:
    assert answer.finish_reason is not None
    num_prompt_tokens = len(work.job.token_ids)
    return Finished(
        reason=answer.finish_reason,
        usage=Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_prefill_tokens=num_prompt_tokens - 1,
            num_decode_prompt_tokens=1,
            num_new_tokens=answer.num_new_tokens,
            kv_received_bytes=0,
            kv_effective_bytes=0,
            num_kv_streams=0,
        ),
        timings=Timings(
            queue_s=work.started_s - work.arrived_s,
            prefill_s=work.prefilled_s - work.started_s,
            first_token_s=work.first_token_s - work.arrived_s,
            decode_s=now_s - work.first_token_s,
        ),
        text=answer.tail,
    )


class _Here:
    """The pool of the one node that there is."""

    @asynccontextmanager
    async def lease(
        self,
        *,
        beat: Beat,  # noqa: ARG002 - nobody waits
        refused_by: Collection[str] = (),  # noqa: ARG002 - there is one
    ) -> AsyncIterator[DecodeLease]:
        yield DecodeLease(address="this process", lease_id="")


@asynccontextmanager
async def serving(model: Path, config: ClusterConfig, security: Security) -> AsyncIterator[tuple[str, OneProcess]]:
    """The server, for as long as the block lasts: its address, and what computes behind it.

    Raises:
        CheckpointError, ConfigError: the model cannot be served.
    """
    checkpoint = Checkpoint.open(model)
    kv_format = KvFormat.of(checkpoint.config, parse_dtype(config.resolved_dtype))
    engine = OneProcess(checkpoint, kv_format, config)
    gateway, clock = config.gateway, MonotonicClock()
    served = ServedModel(
        name=model.name,
        config=checkpoint.config,
        tokenizer=Tokenizer.load(checkpoint),
        fingerprint=fingerprint(checkpoint, kv_format),
    )
    front_door = FrontDoor(
        model=served,
        limits=GatewayLimits(**{each.name: getattr(gateway, each.name) for each in fields(GatewayLimits)}),
        decode_pool=_Here(),
        calls=engine,
        registry=NodeRegistry(clock),
        clock=clock,
    )
    server: grpc.aio.Server = create_server(security)
    clients = Clients(None)
    counts = RequestMetrics(CollectorRegistry(), clients)
    requests = ClientRequests(front_door, clients, Accounts(clock), counts)
    GenerationService(requests, upload_idle_s=gateway.upload_idle_s).add_to(server)
    port = bind(server, gateway.host, gateway.port, security)
    await server.start()
    try:
        yield dial_address(gateway.host, port), engine
    finally:
        await server.stop(0)
        engine.stop()
