"""The owner of every request on this node, from the reservation of its pages to its last token."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from colm.clock import Clock, Deadline
from colm.errors import CapacityExceeded, ColmError, DeadlineExceeded, InvalidRequest, PeerUnavailable
from colm.events import Event, Finished, PrefillProgress, Reserved, Timings, Usage
from colm.sampling import SamplingParams
from colm.tokenizer import Tokenizer
from colm.wire.security import Security
from decode_node.decode_loop import DecodeLoop
from decode_node.kv_receiver import KvReceiver, KvTransfer
from decode_node.kv_store import KvStore
from decode_node.page_pool import PageLease, PagePool
from decode_node.prefill_pool import PrefillPool
from decode_node.sequence import Sequence

logger = logging.getLogger(__name__)

Emit = Callable[[Event], Awaitable[None]]

_PROGRESS_INTERVAL_S = 0.1
_MAX_KV_STREAMS = 8
_FIRST_RETRY_S = 0.25
_LAST_RETRY_S = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeJob:
    """What a caller asks of a decode node."""

    request_id: str
    token_ids: NDArray[np.int64]
    num_chains: int
    max_new_tokens: int
    sampling: SamplingParams
    deadline: Deadline | None


class Stage(Enum):
    """Where a request stands; the last three are its only ends."""

    RESERVED = "reserved"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class _Request:
    job: DecodeJob
    pages: PageLease
    table_LM: NDArray[np.int32]
    arrived_s: float
    stage: Stage = Stage.RESERVED
    num_kv_streams: int = 0
    kv_received_bytes: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    answer: Sequence | None = field(default=None)


class RequestOwner:
    """Runs requests and holds what they hold.

    Args:
        loop: advances all answers together.
        fingerprint: what a prefill node must serve to be of use here.
        tokenizer: None for a model that serves token ids.
        eos_token_ids: tokens that end an answer by the model's own convention.
        max_requests: requests at once; the next is refused.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        store: KvStore,
        loop: DecodeLoop,
        prefill_pool: PrefillPool,
        security: Security,
        fingerprint: str,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        max_requests: int,
        clock: Clock,
    ) -> None:
        self.pool = pool
        self._store = store
        self._loop = loop
        self._prefill_pool = prefill_pool
        self._security = security
        self._fingerprint = fingerprint
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._max_requests = max_requests
        self._clock = clock
        self._receivers = ThreadPoolExecutor(max_workers=max_requests, thread_name_prefix="kv-receiver")
        self._requests: dict[str, _Request] = {}

    def stages(self) -> Counter[Stage]:
        """How many requests stand where."""
        return Counter(request.stage for request in self._requests.values())

    async def run(self, job: DecodeJob, emit: Emit) -> None:
        """Serve one request; returns after its `Finished` was emitted.

        Raises:
            CapacityExceeded: no room; nothing was kept.
            DeadlineExceeded, PeerUnavailable, FingerprintMismatch: as their names say; nothing was kept.
        """
        request = self._reserve(job)
        outcome = Stage.FAILED
        try:
            async with asyncio.timeout(None if job.deadline is None else job.deadline.remaining_s()):
                await self._serve(request, emit)
            outcome = Stage.FINISHED
        except TimeoutError as err:
            raise DeadlineExceeded(f"the deadline passed while the request was {request.stage.value}") from err
        except asyncio.CancelledError:
            outcome = Stage.CANCELLED
            raise
        finally:
            self._finish(request, outcome)

    def _reserve(self, job: DecodeJob) -> _Request:
        if job.request_id in self._requests:
            raise InvalidRequest("request_id", job.request_id, "a request of that id is running on this node")
        if len(self._requests) >= self._max_requests:
            raise CapacityExceeded(f"{self._max_requests} requests run on this decode node already; try again later")
        num_tokens = len(job.token_ids) + job.max_new_tokens
        pages = self.pool.reserve(job.request_id, self._store.layout.pages(num_tokens))
        request = _Request(job, pages, self._store.page_table(pages), self._clock.now())
        self._requests[job.request_id] = request
        logger.info("request.reserved request=%s pages=%d", job.request_id, len(pages.page_ids))
        return request

    def _finish(self, request: _Request, outcome: Stage) -> None:
        """The one way out: whatever ran for the request has stopped, so its pages are free again."""
        self.pool.release(request.pages)
        del self._requests[request.job.request_id]
        logger.info(
            "request.%s request=%s after=%s kv_bytes=%d dur_ms=%.1f",
            outcome.value,
            request.job.request_id,
            request.stage.value,
            request.kv_received_bytes,
            (self._clock.now() - request.arrived_s) * 1e3,
        )

    async def _serve(self, request: _Request, emit: Emit) -> None:
        await emit(Reserved(num_pages=len(request.pages.page_ids)))
        # The prefill node cannot make the first token: that takes all active chains at the last prompt token.
        num_prefill_tokens = len(request.job.token_ids) - 1
        if num_prefill_tokens:
            request.stage = Stage.PREFILLING
            await self._fetch_kv(request, num_prefill_tokens, emit)
        request.stage = Stage.DECODING
        await self._decode(request, emit)

    async def _fetch_kv(self, request: _Request, num_tokens: int, emit: Emit) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                return await self._attempt_kv(request, num_tokens, emit)
            except PeerUnavailable as err:
                if request.num_kv_streams >= _MAX_KV_STREAMS:
                    raise PeerUnavailable(
                        f"gave up after {request.num_kv_streams} KV streams; the last: {err}"
                    ) from err
                logger.warning("transfer.retry request=%s in_s=%.2f cause=%s", request.job.request_id, retry_s, err)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _attempt_kv(self, request: _Request, num_tokens: int, emit: Emit) -> None:
        asked_s = self._clock.now()
        request.num_kv_streams += 1
        transfer = KvTransfer(
            transfer_id=request.job.request_id,
            epoch=request.num_kv_streams,
            fingerprint=self._fingerprint,
            token_ids=request.job.token_ids[:num_tokens],
            table_LM=request.table_LM,
        )
        async with self._prefill_pool.lease(num_tokens=num_tokens) as lease:
            opened_s = self._clock.now()
            request.queue_s += opened_s - asked_s
            receiver = KvReceiver(transfer, lease, self._store, self._security)
            thread = asyncio.get_running_loop().run_in_executor(self._receivers, receiver.run)
            try:
                await self._report_progress(thread, receiver, num_tokens, emit)
                await thread
            finally:
                # Only a thread that has ended can no longer write into the pages.
                receiver.cancel()
                await asyncio.shield(asyncio.wait([thread]))
                request.kv_received_bytes += receiver.ledger.payload_bytes
            request.prefill_s = self._clock.now() - opened_s
        await emit(PrefillProgress(num_tokens_done=num_tokens, num_tokens_total=num_tokens))

    async def _report_progress(
        self, thread: "asyncio.Future[None]", receiver: KvReceiver, num_tokens: int, emit: Emit
    ) -> None:
        reported = -1
        while not thread.done():
            if (done := receiver.ledger.num_tokens_done) != reported and done < num_tokens:
                await emit(PrefillProgress(num_tokens_done=done, num_tokens_total=num_tokens))
                reported = done
            await asyncio.wait([thread], timeout=_PROGRESS_INTERVAL_S)

    async def _decode(self, request: _Request, emit: Emit) -> None:
        job = request.job
        eos_token_ids = () if job.sampling.ignore_eos else self._eos_token_ids
        answer = Sequence(
            next_token_id=int(job.token_ids[-1]),
            position=len(job.token_ids) - 1,
            num_chains=job.num_chains,
            max_new_tokens=job.max_new_tokens,
            table_LM=request.table_LM,
            sampling=job.sampling,
            stop_token_ids={*eos_token_ids, *job.sampling.stop_token_ids},
            text_stream=None if self._tokenizer is None else self._tokenizer.stream(),
        )
        first_token_s = last_token_s = self._clock.now()
        async with aclosing(self._loop.tokens(answer)) as tokens:
            async for token in tokens:
                last_token_s = self._clock.now()
                if answer.num_new_tokens == 1:
                    first_token_s = last_token_s
                await emit(token)
        await emit(self._finished(request, answer, first_token_s, last_token_s))

    def _finished(self, request: _Request, answer: Sequence, first_token_s: float, last_token_s: float) -> Finished:
        if answer.finish_reason is None:
            raise ColmError("the decode loop let go of an unfinished answer")
        return Finished(
            reason=answer.finish_reason,
            usage=Usage(
                num_prompt_tokens=len(request.job.token_ids),
                num_prefill_tokens=len(request.job.token_ids) - 1,
                num_decode_prompt_tokens=1,
                num_new_tokens=answer.num_new_tokens,
                kv_received_bytes=request.kv_received_bytes,
                num_kv_streams=request.num_kv_streams,
            ),
            timings=Timings(
                queue_s=request.queue_s,
                prefill_s=request.prefill_s,
                first_token_s=first_token_s - request.arrived_s,
                decode_s=last_token_s - first_token_s,
            ),
            text=answer.tail,
        )
