"""Owns every request on this node, from its place in the line for pages to its last token."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum
from math import inf

import numpy as np
from numpy.typing import NDArray

from colm import tracing
from colm.clock import Clock, Deadline
from colm.errors import CapacityExceeded, ColmError, DeadlineExceeded, InvalidRequest
from colm.events import Event, Finished, Queued, Reserved, Timings, Token, Usage, WaitsFor
from colm.request import AttentionMode, KvCodec
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from colm.text.tokenizer import Tokenizer
from decode_node.constraint import ConstrainedText
from decode_node.decode_loop import DecodeLoop
from decode_node.drafter import Drafting
from decode_node.grammar import Grammars
from decode_node.kv_fetch import KvAccount, KvFetcher, KvOrder
from decode_node.kv_store import KvStore
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease
from decode_node.page_wait import PrefillPace, page_wait_s
from decode_node.prefix_cache import PagesWanted, Reservation
from decode_node.prompt_blocks import PromptBlocks
from decode_node.provisional import Provisional, ProvisionalOutcome
from decode_node.running_answer import RunningAnswer
from decode_node.shared_prefill import SharedPrefills

logger = logging.getLogger(__name__)

Emit = Callable[[Event], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeJob:
    """What a caller asks of a decode node."""

    request_id: str
    token_ids: NDArray[np.int64]
    """The prompt."""
    scale: Changing[Scale]
    """Chains that make its tokens; the caller may change it at any time."""
    max_new_tokens: int
    """Of the whole answer."""
    sampling: SamplingParams
    deadline: Deadline | None
    only_if_room: bool = False
    """Refuse the job, rather than let it wait, unless its pages are free now."""
    attention: AttentionMode = "dense"
    """How the prefill attends."""
    kv_codec: KvCodec = "raw"
    """How its keys and values come here."""
    max_draft_tokens: int | None = None
    """Of a round; None leaves it to the node, whose own limit holds in any case."""
    made_token_ids: tuple[int, ...] = ()
    """The answer so far, where another node began it; it goes on behind them."""
    cache_salt: bytes = b""
    """Whose prompt it is; it shares pages with prompts of the same alone."""
    provisional_first_token: bool = False
    """Tell what chain 1 says first, as soon as the prefill node knows it."""

    @property
    def wants_provisional(self) -> bool:
        """Whether a provisional token is worth asking for.

        At one chain the answer's own first token is about as soon, and a grammar seldom lets it begin as chain 1 would.
        """
        has_one_chain = self.scale.value.num_chains == 1
        is_held = self.sampling.constraint is not None or bool(self.made_token_ids)
        return self.provisional_first_token and not (has_one_chain or is_held)


class Stage(Enum):
    """Stages of a request; the last three are its only ends."""

    WAITING = "waiting for KV pages"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class _Request:
    job: DecodeJob
    arrived_s: float
    provisional: Provisional
    stage: Stage = Stage.WAITING
    pages: PageLease | None = None
    num_found_tokens: int = 0
    """Of the prompt, in pages of others that are here or on their way."""
    account: KvAccount = field(default_factory=KvAccount)


@dataclass(slots=True)
class PrefixCounts:
    """How much of prompts other requests' pages held."""

    num_query_tokens: int = 0
    """That were looked for."""
    num_hit_tokens: int = 0
    """Of those, that were found."""


class RequestOwner:
    """Runs requests, and releases what each holds when it ends.

    Args:
        page_line: lends pages.
        fetcher: brings keys and values into pages.
        loop: advances all answers together.
        tokenizer: None for a model that serves token ids.
        grammars: compiles what constrains answers.
        eos_token_ids: tokens that end an answer by the model's own convention.
        max_requests: requests at once, waiting ones included; the next is refused.
        max_local_prefill_tokens: prompts of so many tokens are computed here, longer ones by a prefill node.
        drafting: decides how much answers draft; None drafts nothing.
        blocks: names the parts of prompts that requests share; None shares nothing.
    """

    def __init__(
        self,
        *,
        page_line: PageLine,
        store: KvStore,
        fetcher: KvFetcher,
        loop: DecodeLoop,
        tokenizer: Tokenizer | None,
        grammars: Grammars,
        eos_token_ids: tuple[int, ...],
        max_requests: int,
        max_local_prefill_tokens: int,
        drafting: Drafting | None,
        blocks: PromptBlocks | None,
        clock: Clock,
    ) -> None:
        self._page_line = page_line
        self._store = store
        self._fetcher = fetcher
        self._prefills = SharedPrefills(fetcher, page_line, store)
        self._blocks = blocks
        self._loop = loop
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._eos_token_ids = eos_token_ids
        self._max_requests = max_requests
        self._max_local_prefill_tokens = max_local_prefill_tokens
        self._drafting = drafting
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self.ended = Counter[Stage]()
        """Requests that have ended, by how they did."""
        self.prefix = PrefixCounts()
        self.provisional = Counter[ProvisionalOutcome]()
        """Provisional tokens that prefill nodes were asked for, by what became of them."""
        self._prefill_pace = PrefillPace()

    def stages(self) -> Counter[Stage]:
        """The number of requests in each stage."""
        return Counter(request.stage for request in self._requests.values())

    def num_pages_of(self, stage: Stage) -> int:
        """Pages of the requests in a stage, as if they shared none."""
        return sum(self._num_pages(each.job) for each in self._requests.values() if each.stage is stage)

    async def run(self, job: DecodeJob, emit: Emit) -> None:
        """Serve one request; returns after its `Finished` was emitted. However it ends, it holds nothing any more.

        Raises:
            InvalidRequest: it can never be served here.
            CapacityExceeded: there is no room, and it may not wait, or the line is full.
            DeadlineExceeded, PeerUnavailable, PeerFailed, FingerprintMismatch: as their names say.
        """
        request = self._admit(job)
        outcome = Stage.FAILED

        async def tell(event: Event) -> None:
            if (news := request.provisional.see(event)) is not None:
                await emit(news)

        try:
            async with asyncio.timeout(None if job.deadline is None else job.deadline.remaining_s()):
                with tracing.span("decode", request=job.request_id, chains=job.scale.value.num_chains):
                    await self._serve(request, tell)
            outcome = Stage.FINISHED
        except TimeoutError as err:
            raise DeadlineExceeded(f"the deadline passed while the request was {request.stage.value}") from err
        except asyncio.CancelledError:
            outcome = Stage.CANCELLED
            raise
        finally:
            self._finish(request, outcome)

    def _admit(self, job: DecodeJob) -> _Request:
        if job.request_id in self._requests:
            raise InvalidRequest("request_id", job.request_id, "a request of that id is running on this node")
        num_pages, pool = self._num_pages(job), self._page_line.pool
        if num_pages > pool.num_pages:
            raise InvalidRequest(
                "max_new_tokens",
                job.max_new_tokens,
                f"with {len(job.token_ids)} prompt tokens it needs {num_pages} KV pages and a decode node has "
                f"{pool.num_pages} in all; shorten either, or raise decode.kv_cache_bytes",
            )
        if len(self._requests) >= self._max_requests:
            raise CapacityExceeded(f"{self._max_requests} requests are on this decode node already; try again later")
        provisional = Provisional(has_begun=bool(job.made_token_ids), clock=self._clock, outcomes=self.provisional)
        request = _Request(job, self._clock.now(), provisional)
        self._requests[job.request_id] = request
        return request

    def _num_pages(self, job: DecodeJob) -> int:
        return self._store.layout.pages(len(job.token_ids) + job.max_new_tokens)

    def _finish(self, request: _Request, outcome: Stage) -> None:
        """Release what a request holds, whatever its end. Nothing is awaited, so a second cancellation changes nothing.

        A step or a receiving thread that still runs holds the pages for itself.
        """
        if request.pages is not None:
            self._page_line.release(request.pages)
        del self._requests[request.job.request_id]
        self.ended[outcome] += 1
        logger.info(
            "request.%s request=%s after=%s kv_bytes=%d dur_ms=%.1f",
            outcome.name.lower(),
            request.job.request_id,
            request.stage.name.lower(),
            request.account.kv_received_bytes,
            (self._clock.now() - request.arrived_s) * 1e3,
        )

    async def _serve(self, request: _Request, emit: Emit) -> None:
        job, tile_tokens = request.job, self._fetcher.tile_tokens
        # First: a constraint that cannot be compiled takes no pages, and no prefill.
        constrained = await self._grammars.begin(job.sampling.constraint)
        wanted = self._wanted(job, tile_tokens)
        with tracing.span("reserve_pages"):
            reservation = await self._reserve(job, wanted, emit)
        pages = request.pages = reservation.lease
        request.account.queue_s = self._clock.now() - request.arrived_s
        table_M = self._store.page_table(pages)
        answer = order = None
        try:
            answer = self._begin(job, table_M, constrained)
        finally:
            if answer is None or answer.finish_reason is not None:
                self._page_line.cache.abandon(pages)
        if answer.finish_reason is None:
            order = self._order(request, wanted, reservation, table_M, tile_tokens)
        if order is not None and job.wants_provisional:
            order = request.provisional.asked_with(order, int(job.token_ids[-1]), answer, emit)
        with self._prefills.of(reservation, order, request.account) as follow:
            logger.info(
                "request.reserved request=%s pages=%d found_tokens=%d",
                job.request_id,
                pages.num_pages,
                request.num_found_tokens,
            )
            await emit(Reserved(num_pages=pages.num_pages))
            request.stage = Stage.PREFILLING
            began_s = self._clock.now()
            await follow(emit)
            if order is None:
                request.account.queue_s += self._clock.now() - began_s
        if order is not None:
            self._prefill_pace.note(len(order.token_ids) - order.first_token, request.account.prefill_s)
        request.stage = Stage.DECODING
        with tracing.span("answer") as note:
            await self._decode(request, pages, answer, emit)
            note(tokens=answer.num_new_tokens)

    def _order(
        self,
        request: _Request,
        wanted: PagesWanted,
        reservation: Reservation,
        table_M: NDArray[np.int32],
        tile_tokens: int,
    ) -> KvOrder | None:
        """What a prefill node has to bring; None for nothing. Notes what was found."""
        job, num_found = request.job, reservation.num_found
        token_ids = job.token_ids[: self._num_prefill_tokens(job)]
        if wanted.keys:
            is_all = num_found == len(wanted.keys)
            num_whole_tokens = sum(wanted.sizes[:num_found]) * self._store.layout.page_tokens
            request.num_found_tokens = len(token_ids) if is_all else num_whole_tokens
            self.prefix.num_query_tokens += len(token_ids)
            self.prefix.num_hit_tokens += request.num_found_tokens
        if request.num_found_tokens == len(token_ids):
            return None
        return KvOrder(
            request_id=job.request_id,
            token_ids=token_ids,
            pages=reservation.lease,
            table_M=table_M,
            attention=job.attention,
            codec=job.kv_codec,
            first_token=request.num_found_tokens,
            tile_tokens=tile_tokens,
            cache_salt=job.cache_salt,
        )

    def _wanted(self, job: DecodeJob, tile_tokens: int) -> PagesWanted:
        num_prefill_tokens = self._num_prefill_tokens(job)
        if self._blocks is None or not num_prefill_tokens or not tile_tokens:
            return PagesWanted(num_pages=self._num_pages(job))
        return self._blocks.wanted(
            job.token_ids[:num_prefill_tokens],
            num_tokens=len(job.token_ids) + job.max_new_tokens,
            tile_tokens=tile_tokens,
            attention=job.attention,
            codec=job.kv_codec,
            cache_salt=job.cache_salt,
        )

    def _num_prefill_tokens(self, job: DecodeJob) -> int:
        """How many of the prompt's tokens a prefill node computes.

        Never the last: the first token of the answer takes all active chains there, and only this node has them. None
        of a short prompt: chain 1 is here as well, and reads them in the step that makes the first token.
        """
        num_tokens = len(job.token_ids)
        return 0 if num_tokens <= self._max_local_prefill_tokens and job.attention == "dense" else num_tokens - 1

    async def _reserve(self, job: DecodeJob, wanted: PagesWanted, emit: Emit) -> Reservation:
        if (reservation := self._page_line.reserve_now(job.request_id, wanted)) is not None:
            return reservation
        if job.only_if_room:
            num_free, num_pages = self._page_line.cache.num_available, self._page_line.pool.num_pages
            raise CapacityExceeded(
                f"the request needs {wanted.num_pages} KV pages; {num_free} of {num_pages} are free and "
                f"{self._page_line.num_waiting} requests wait for some; try again later"
            )

        async def beat(num_ahead: int) -> None:
            wait_s = self._page_wait_s(num_ahead)
            await emit(Queued(waits_for=WaitsFor.PAGES, num_ahead=num_ahead, estimated_wait_s=wait_s))

        return await self._page_line.reserve(job.request_id, wanted, beat, job.cache_salt)

    def _page_wait_s(self, num_ahead: int) -> float | None:
        """How long a request waits for pages that has so many before it; None where nobody can tell."""
        ends_s = self._loop.ends_s()
        held = [
            (request.pages, ends_s[request.pages] if request.pages in ends_s else self._work_s(request.job))
            for request in self._requests.values()
            if request.pages is not None
        ]
        in_line = [
            (self._page_line.cache.num_needed(wanted), self._work_s(self._requests[request_id].job))
            for request_id, wanted in self._page_line.waiting[: num_ahead + 1]
        ]
        return page_wait_s(self._page_line.cache.num_available, held, in_line)

    def _work_s(self, job: DecodeJob) -> float:
        """How long a job that has pages, and no place in the batch, will have them; infinite while nobody knows."""
        if (token_s := self._loop.token_s) is None:
            return inf
        num_left = job.max_new_tokens - len(job.made_token_ids)
        return self._prefill_pace.seconds(self._num_prefill_tokens(job)) + num_left * token_s

    def _begin(self, job: DecodeJob, table_M: NDArray[np.int32], constrained: ConstrainedText | None) -> RunningAnswer:
        num_prefill_tokens = self._num_prefill_tokens(job)
        eos_token_ids = () if job.sampling.ignore_eos else self._eos_token_ids
        return RunningAnswer(
            unread_token_ids=job.token_ids[num_prefill_tokens:].tolist(),
            position=num_prefill_tokens,
            num_chains=job.scale.value.num_chains,
            max_new_tokens=job.max_new_tokens,
            table_M=table_M,
            sampling=job.sampling,
            stop_token_ids={*eos_token_ids, *job.sampling.stop_token_ids},
            # A grammar allows a first space or not; what it allows is what is shown.
            text_stream=None
            if self._tokenizer is None
            else self._tokenizer.stream(keeps_first_space=constrained is not None),
            drafter=self._drafting.drafter(job.max_draft_tokens) if self._drafting else None,
            prompt_token_ids=job.token_ids,
            constrained=constrained,
            made_token_ids_N=job.made_token_ids,
        )

    async def _decode(self, request: _Request, pages: PageLease, answer: RunningAnswer, emit: Emit) -> None:
        job, account, provisional_s = request.job, request.account, request.provisional.token_s
        num_prefill_tokens = self._num_prefill_tokens(job)
        if answer.finish_reason is None:
            first_token_s = last_token_s = None
            async with aclosing(self._loop.events(answer, pages, job.scale, job.cache_salt)) as events:
                async for event in events:
                    if isinstance(event, Token):
                        last_token_s = self._clock.now()
                        first_token_s = last_token_s if first_token_s is None else first_token_s
                    await emit(event)
            if answer.finish_reason is None or first_token_s is None or last_token_s is None:
                raise ColmError("the decode loop let go of an unfinished answer")
        else:  # the node that was lost had only its last word to say
            first_token_s = last_token_s = self._clock.now()
        await emit(
            Finished(
                reason=answer.finish_reason,
                usage=Usage(
                    num_prompt_tokens=len(job.token_ids),
                    num_prefill_tokens=num_prefill_tokens - request.num_found_tokens,
                    num_cached_tokens=request.num_found_tokens,
                    num_decode_prompt_tokens=len(job.token_ids) - num_prefill_tokens,
                    num_new_tokens=answer.num_new_tokens,
                    kv_received_bytes=account.kv_received_bytes,
                    kv_effective_bytes=account.kv_effective_bytes,
                    num_kv_streams=account.num_kv_streams,
                    kv_shared_bytes=account.kv_shared_bytes,
                    num_draft_tokens=answer.num_draft_tokens,
                    num_accepted_tokens=answer.num_accepted_tokens,
                    num_prefill_cached_tokens=max(0, account.num_cached_tokens - request.num_found_tokens),
                ),
                timings=Timings(
                    queue_s=account.queue_s,
                    prefill_s=account.prefill_s,
                    first_token_s=first_token_s - request.arrived_s,
                    decode_s=last_token_s - first_token_s,
                    provisional_token_s=None if provisional_s is None else provisional_s - request.arrived_s,
                ),
                text=answer.tail,
                sparse=account.sparse,
            )
        )
