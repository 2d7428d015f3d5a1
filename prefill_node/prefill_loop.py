"""The engine and its thread, and the jobs that use it: a few steps at a time, of one job or of several as one.

What was kept of a prompt needs no engine: another thread makes its messages, a few at a time, of one job after the
other. A prompt that is kept whole begins as soon as there is memory for its window. One that is kept in part begins
with what is kept while the engine makes a step of another, if it is next.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

from colm.clock import Clock
from colm.errors import CapacityExceeded, InvalidRequest, PeerUnavailable, ReaderStalled, TransferSuperseded
from colm.line import BEAT_INTERVAL_S, wait_at_most
from prefill_node.cost_model import CostModel, Work
from prefill_node.engine import PrefillEngine
from prefill_node.job_bytes import job_bytes
from prefill_node.job_policy import Wait, job_in_the_way, may_begin, needs_memory_alone, next_job, wait_of
from prefill_node.job_stream import JobStream
from prefill_node.kept_maker import KeptMaker, KeptMaking
from prefill_node.making import Making, Steps, make_steps
from prefill_node.prefill_job import PrefillJob, PrefillOrder
from prefill_node.prefill_load import PrefillCounts, PrefillLoad
from prefill_node.prefix_cache import PrefixCache, PrefixHold
from prefill_node.prefix_uplink import PrefixUplinks
from prefill_node.quantum import next_quantum
from prefill_node.sparse.prompt_plans import PromptPlans

UNHURRIED_STALLS = 10
"""How many times as long a reader may store nothing while nobody waits for the memory of its job."""

WaitBeat = Callable[[Wait], Awaitable[None]]
"""Told of a wait as it begins, when a job has begun, and every `BEAT_INTERVAL_S`."""


class PrefillLoop:
    """Owns the engine and every job. Lives on one event loop; only steps and messages are made in threads.

    Args:
        engine: computes the tiles.
        costs: of the engine; corrected by what steps take.
        clock: measures leases and steps; the engine's thread reads it too.
        max_queued: jobs that may wait to begin; the next is refused.
        max_queued_s: engine time that may go before a new job, as estimated; with more it is refused.
        memory_bytes: what jobs that have begun may hold together: each its prompt's hidden states, one layer of its
            keys and values, and a window of tiles.
        lease_s: how long a job without a stream is kept.
        stall_s: how long a reader may store nothing while somebody waits for its job's memory; else
            `UNHURRIED_STALLS` times as long.
        prefixes: keeps what is computed for prompts that begin alike; None keeps nothing.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        costs: CostModel,
        clock: Clock,
        *,
        max_queued: int,
        max_queued_s: float,
        memory_bytes: int,
        lease_s: float,
        stall_s: float,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._engine = engine
        self.prefixes = prefixes or PrefixCache(engine.kv_format, tile_tokens=engine.tile_tokens, budget_bytes=0)
        self._costs = costs
        self._clock = clock
        self.uplinks = PrefixUplinks(self.prefixes, costs, engine.kv_format, clock)
        self._max_queued = max_queued
        self._max_queued_s = max_queued_s
        self._memory_bytes = memory_bytes
        self._lease_s = lease_s
        self._stall_s = stall_s
        self._events = asyncio.get_running_loop()
        self._jobs: dict[str, PrefillJob] = {}
        self._places = count()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefill")
        self._stepping: Sequence[PrefillJob] = ()
        """Whose steps the engine's thread makes."""
        self._kept = KeptMaker(self._made_kept)
        self._timer: asyncio.TimerHandle | None = None
        self._has_stopped = False
        self._waits_for_readers_since_s: float | None = None
        self.counts = PrefillCounts()

    @property
    def load(self) -> PrefillLoad:
        """Jobs that have begun, those that were given up and still end included, and jobs that wait to begin."""
        in_threads = {*self._stepping, self._kept.reading} - {None}
        started = {job for job in self._jobs.values() if job.is_started} | in_threads
        return PrefillLoad(
            num_active=len(started),
            num_queued=len(self._waiting()),
            remaining_s=sum(job.remaining_s for job in self._jobs.values()),
            window_bytes=sum(job.window_bytes for job in self._jobs.values()),
            engine_s=self.counts.engine_s,
            prompt_cost=self._costs.prompt_cost(),
        )

    @property
    def mark(self) -> tuple[float, ...] | None:
        """What the engine's work changes, inside a step too; None while it makes none."""
        return (self.counts.engine_s, *(job.cancelled.done_share for job in self._stepping)) if self._stepping else None

    def check(self, num_tokens: int, sparse: PromptPlans | None = None, *, reads_last_token: bool = False) -> None:
        """Refuse a prompt that could never begin.

        Raises:
            InvalidRequest: it needs more memory than there is.
        """
        needed_bytes = job_bytes(self._engine, num_tokens, sparse, reads_last_token=reads_last_token)
        if needed_bytes > self._memory_bytes:
            raise InvalidRequest(
                "num_tokens",
                num_tokens,
                f"needs {needed_bytes} bytes on the prefill node, and its prompts have {self._memory_bytes} in all; "
                "shorten it, or raise prefill.memory_bytes",
            )

    def attach(self, order: PrefillOrder) -> JobStream:
        """Take the order's job over from an older stream, or make a new job that waits for its turn.

        Give the stream back with `detach`.

        Raises:
            CapacityExceeded: too many wait already, or too much would go before it.
            TransferSuperseded: a stream of the same or a newer epoch has come before.
        """
        job = self._jobs.get(order.transfer_id)
        if job is not None:
            job.require_newer(order)
            if job.can_resume(order):
                return self._attached(job, order)
            job.fail(TransferSuperseded(f"transfer {order.transfer_id!r} begins anew in epoch {order.epoch}"))
            self._remove(job)
        # A plan depends on the whole prompt, and so do the keys and values above it.
        hold = PrefixHold() if order.sparse is not None else self.prefixes.hold(order.token_ids, order.cache_salt)
        job = PrefillJob(
            order,
            place=next(self._places),
            kv_format=self._engine.kv_format,
            costs=self._costs,
            begun_bytes=self._begun_bytes(order, hold),
            on_change=self.look_again,
            hold=hold,
        )
        if (estimated_s := self._wait_of(job).estimated_s) > self._max_queued_s:
            self.prefixes.close(hold)
            raise CapacityExceeded(
                f"this prompt would wait about {estimated_s:.0f} s at this prefill node, longer than "
                f"prefill.max_queued_s={self._max_queued_s:g}; try again later"
            )
        self._jobs[order.transfer_id] = job
        stream = self._attached(job, order)
        if job in self._waiting() and (num_others := len(self._waiting()) - 1) >= self._max_queued:
            self._forget(job)
            raise CapacityExceeded(f"{num_others} requests wait for this prefill node already; try again later")
        return stream

    async def turn(self, stream: JobStream, beat: WaitBeat) -> None:
        """Wait until the stream's job has begun.

        Args:
            stream: of `attach`.
            beat: told of the wait.

        Raises:
            TransferSuperseded: a newer stream reads the job.
        """
        while not (stream.job.is_started or stream.job.is_over):
            stream.news.clear()
            await beat(self._wait_of(stream.job))
            if not stream.news.is_set():
                await wait_at_most(stream.news, BEAT_INTERVAL_S)
            stream.require_current()

    def detach(self, stream: JobStream) -> None:
        """The stream reads no more; its job, unless another one reads it or it is over, is kept for its lease."""
        job = stream.job
        self._end_uplink(stream)
        if job.stream is stream:
            job.stream, job.lease_ends_s = None, self._clock.now() + self._lease_s
            self.look_again()

    def give_up(self, stream: JobStream) -> None:
        """The stream's caller wants no more of its job: stop it inside its kernels, and forget it."""
        if stream.job.stream is stream and stream.job.transfer_id in self._jobs:
            self._forget(stream.job)
            self.look_again()

    def look_again(self) -> None:
        """Something has changed: forget what is over, and give the engine its next step."""
        if self._has_stopped:
            return
        now_s = self._clock.now()
        for job in list(self._jobs.values()):
            has_expired = job.lease_ends_s is not None and job.lease_ends_s <= now_s
            if job.is_over or job.error is not None or has_expired:
                self.counts.num_leases_expired += has_expired and job.error is None and not job.is_over
                self._forget(job)
        uplinks_end_s = self._expire_uplinks(now_s)
        stalls_end_s = self._drop_stalled(now_s)
        self._begin_kept()
        if not self._stepping:
            self._step_next()
        self._start_ahead()
        self._kept.make_next(self._jobs.values())
        self._count_wait_for_readers(now_s)
        self._look_again_when(stalls_end_s + uplinks_end_s, now_s)

    async def stop(self) -> None:
        """End every job and the thread."""
        self._has_stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for job in self._jobs.values():
            job.fail(PeerUnavailable("this prefill node stops"))
        self._jobs.clear()
        await asyncio.to_thread(self._executor.shutdown)
        await self._kept.stop()

    def _attached(self, job: PrefillJob, order: PrefillOrder) -> JobStream:
        self._end_uplink(job.stream)
        stream = job.attach(order)
        if not (job.is_started or job.is_over):
            self._bring_up(stream)
        self.look_again()
        return stream

    def _bring_up(self, stream: JobStream) -> None:
        """Ask for what a job lacks of its prompt's beginning, or wait for another one's that brings it."""
        job = stream.job
        stream.awaited = self.uplinks.bringing(job.hold)
        if stream.awaited is None and stream.uplink is None:
            stream.uplink = self.uplinks.begin(
                job.hold,
                num_tokens=len(job.token_ids),
                held_tokens=stream.held_tokens,
                transfer_id=job.transfer_id,
                epoch=job.epoch,
                on_change=lambda: self._came_up(job),
            )
            stream.news.set()  # there is something to say

    def _end_uplink(self, stream: JobStream | None) -> None:
        if stream is not None and stream.uplink is not None and not stream.uplink.is_over:
            stream.uplink.close()
            self._share_kept()

    def _came_up(self, job: PrefillJob) -> None:
        """More of a job's prompt has come up, or will not."""
        job.find_more(self._begun_bytes(job, job.hold))
        self._share_kept()
        self.look_again()

    def _expire_uplinks(self, now_s: float) -> list[float]:
        """End those that have taken too long; returns when the others will have."""
        ends_s = []
        for job in self._waiting():
            uplink = None if job.stream is None else job.stream.uplink
            if uplink is not None and not uplink.is_over:
                if uplink.ends_s > now_s:
                    ends_s.append(uplink.ends_s)
                else:
                    uplink.expire()
        return ends_s

    def _waiting(self) -> list[PrefillJob]:
        return [job for job in self._jobs.values() if not job.is_started]

    def _wait_of(self, job: PrefillJob) -> Wait:
        return wait_of(job, self._jobs.values(), memory_bytes=self._memory_bytes)

    def _step_next(self) -> None:
        jobs = self._jobs.values()
        while (quantum := next_quantum(jobs, self._costs, memory_bytes=self._memory_bytes)) is None:
            if (idle := job_in_the_way(jobs)) is None:
                return
            self._forget(idle)
            self._begin_kept()
        stepping = [*quantum.own_s]
        if beginning := [each for each in stepping if not each.is_begun]:
            for each in beginning:
                self.prefixes.begin(each.hold, is_alone=len(stepping) == 1)
                prefix = tuple(each.hold.read)
                each.begin(
                    self._engine.begin(
                        each.token_ids,
                        sparse=each.sparse,
                        cancelled=each.cancelled,
                        prefix=prefix,
                        last_token_id=each.last_token_id,
                    )
                )
            for other in self._waiting():
                if other.stream is not None:
                    other.stream.news.set()
        if len(stepping) > 1:
            for each in stepping:
                self.prefixes.abandon(each.hold)
        self._stepping = stepping
        step = self._executor.submit(
            make_steps, self._engine, [Making.of(each) for each in stepping], quantum.num_steps, self._clock
        )
        step.add_done_callback(lambda done: self._events.call_soon_threadsafe(self._stepped, done))

    def _begin_kept(self) -> None:
        """Begin what needs no engine, as far as there is memory."""
        jobs = self._jobs.values()
        for job in jobs:
            if job.is_begun or not job.is_computed:
                continue
            if job.is_started or (needs_memory_alone(job) and may_begin(job, jobs, memory_bytes=self._memory_bytes)):
                self.prefixes.begin(job.hold, is_alone=True)
                job.begin(None)

    def _start_ahead(self) -> None:
        """Let the next job send what is kept of it, while the engine makes a step of another."""
        if self._stepping:
            ahead = next_job(self._jobs.values(), memory_bytes=self._memory_bytes)
            if ahead is not None and not ahead.is_started and ahead.sends_kept:
                ahead.start()

    def _made_kept(self, job: PrefillJob, making: KeptMaking, error: BaseException | None) -> None:
        if self._jobs.get(job.transfer_id) is not job:
            self._let_go(job)
        elif error is not None:
            self._remove(job)
            job.fail(error)
        else:
            job.add_kept(making.messages, making.end)
        self.look_again()

    def _stepped(self, done: "Future[Steps]") -> None:
        jobs, self._stepping = self._stepping, ()
        error = done.exception()
        makings = [None] * len(jobs) if error is not None else done.result().makings
        works = []
        for job, made in zip(jobs, makings, strict=True):
            if self._jobs.get(job.transfer_id) is not job:
                self._let_go(job)
                continue
            failure = error if made is None else made.run.error
            if failure is None:
                assert made is not None
                works.append(job.produce(made.tiles, made.end, made.num_pauses))
                if job.is_computed:
                    self.counts.num_tokens += job.num_computed_tokens
                    self._keep(job)
            else:
                self._remove(job)
                job.fail(failure)
        if error is None:
            self.counts.engine_s += done.result().took_s
        # What was given up on the way is not what the model counts.
        if len(works) == len(jobs):
            self._costs.observe(Work.shared(works), done.result().took_s)
        self.look_again()

    def _begun_bytes(self, job: PrefillJob | PrefillOrder, hold: PrefixHold) -> int:
        is_read = job.last_token_id is not None
        return job_bytes(self._engine, len(job.token_ids), job.sparse, hold.num_cached_tokens, reads_last_token=is_read)

    def _keep(self, computed: PrefillJob) -> None:
        """What a job has computed is there for those that wait; what it reads, until its reader has stored it."""
        self.prefixes.settle(computed.hold)
        self._share_kept()

    def _share_kept(self) -> None:
        """Those that have not begun find what is kept by now."""
        for job in [job for job in self._jobs.values() if not job.is_begun]:
            if self.prefixes.look_again(job.hold):
                job.find_more(self._begun_bytes(job, job.hold))
            if not job.is_started and job.stream is not None and job.stream.awaited is not None:
                self._bring_up(job.stream)

    def _remove(self, job: PrefillJob) -> None:
        del self._jobs[job.transfer_id]
        self._end_uplink(job.stream)
        self._let_go(job)

    def _let_go(self, job: PrefillJob) -> None:
        """A job that is over holds nothing any more, once no thread reads or fills what it holds."""
        if job not in self._stepping and job is not self._kept.reading:
            self.prefixes.close(job.hold)

    def _forget(self, job: PrefillJob) -> None:
        self._remove(job)
        job.cancel()

    def _count_wait_for_readers(self, now_s: float) -> None:
        if (since_s := self._waits_for_readers_since_s) is not None:
            self.counts.reader_wait_s += now_s - since_s
        is_held_up = not self._stepping and any(
            job.waits_for_reader and not job.is_computed for job in self._jobs.values()
        )
        self._waits_for_readers_since_s = now_s if is_held_up else None

    def _drop_stalled(self, now_s: float) -> list[float]:
        """Drop jobs whose readers have stored nothing for too long; returns when the others' time will be over."""
        free_bytes = self._memory_bytes - sum(job.memory_bytes for job in self._jobs.values() if job.is_started)
        is_wanted = any(job.has_reader and job.memory_bytes > free_bytes for job in self._waiting())
        limit_s, why = (
            (self._stall_s, " and others wait for its memory") if is_wanted else (UNHURRIED_STALLS * self._stall_s, "")
        )
        ends_s = []
        for job in list(self._jobs.values()):
            if not job.waits_for_reader:
                job.stalled_since_s = None
                continue
            if job.stalled_since_s is None:
                job.stalled_since_s = now_s
            if now_s < job.stalled_since_s + limit_s:
                ends_s.append(job.stalled_since_s + limit_s)
                continue
            self._remove(job)
            job.drop(
                ReaderStalled(
                    f"the reader of transfer {job.transfer_id!r} has stored nothing for {limit_s:g} s{why}; "
                    f"prefill.stall_s={self._stall_s:g}"
                )
            )
        return ends_s

    def _look_again_when(self, stalls_end_s: list[float], now_s: float) -> None:
        """Look again when the next stall, uplink or lease is over."""
        if self._timer is not None:
            self._timer.cancel()
        ends_s = stalls_end_s + [job.lease_ends_s for job in self._jobs.values() if job.lease_ends_s is not None]
        self._timer = self._events.call_later(min(ends_s) - now_s, self.look_again) if ends_s else None
