"""The engine and its thread, and the jobs that use it: a few steps at a time, whose is decided before."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
from colm_kernels.native import CancelFlag
from numpy.typing import NDArray

from colm.clock import Clock
from colm.errors import CapacityExceeded, InvalidRequest, PeerUnavailable, ReaderStalled, TransferSuperseded
from colm.kv import KvTile
from colm.kv_position import KvPosition
from colm.line import BEAT_INTERVAL_S, wait_at_most
from prefill_node.cost_model import CostModel
from prefill_node.encoded_tile import EncodedTile, TileEncoder
from prefill_node.engine import PrefillEngine
from prefill_node.job_policy import Wait, charge, job_in_the_way, next_job, wait_of
from prefill_node.prefill_job import JobStream, PrefillJob, PrefillOrder, job_bytes
from prefill_node.sparse.prompt_plans import PromptPlans

QUANTUM_S = 0.010
"""Work for which the policy is not asked again: of a short prompt, several steps. A step is never divided."""
UNHURRIED_STALLS = 10
"""How many times as long a reader may store nothing while nobody waits for the memory of its job."""

WaitBeat = Callable[[Wait], Awaitable[None]]
"""Told of a wait as it begins, when a job has begun, and every `BEAT_INTERVAL_S`."""


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """How busy the node is."""

    num_active: int
    num_queued: int


class PrefillLoop:
    """Owns the engine and every job. Lives on one event loop; only steps run in the engine's thread.

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
    ) -> None:
        self._engine = engine
        self._costs = costs
        self._clock = clock
        self._max_queued = max_queued
        self._max_queued_s = max_queued_s
        self._memory_bytes = memory_bytes
        self._lease_s = lease_s
        self._stall_s = stall_s
        self._events = asyncio.get_running_loop()
        self._jobs: dict[str, PrefillJob] = {}
        self._places = count()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefill")
        self._stepping: PrefillJob | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._has_stopped = False

    @property
    def load(self) -> PrefillLoad:
        """Jobs that have begun, one that was given up and still ends included, and jobs that wait to begin."""
        started = {job for job in self._jobs.values() if job.is_started}
        if self._stepping is not None:
            started.add(self._stepping)
        return PrefillLoad(num_active=len(started), num_queued=len(self._waiting()))

    def check(self, num_tokens: int) -> None:
        """Refuse a prompt that could never begin.

        Raises:
            InvalidRequest: it needs more memory than there is.
        """
        if (needed_bytes := job_bytes(self._engine, num_tokens)) > self._memory_bytes:
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
            del self._jobs[order.transfer_id]
        job = PrefillJob(
            order,
            place=next(self._places),
            kv_format=self._engine.kv_format,
            costs=self._costs,
            begun_bytes=job_bytes(self._engine, len(order.token_ids)),
            on_change=self.look_again,
        )
        if (estimated_s := self._wait_of(job).estimated_s) > self._max_queued_s:
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
            if job.is_over or (job.lease_ends_s is not None and job.lease_ends_s <= now_s):
                self._forget(job)
        stalls_end_s = self._drop_stalled(now_s)
        if self._stepping is None:
            self._step_next()
        self._look_again_when(stalls_end_s, now_s)

    async def stop(self) -> None:
        """End every job and the thread."""
        self._has_stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for job in self._jobs.values():
            job.fail(PeerUnavailable("this prefill node stops"))
        self._jobs.clear()
        await asyncio.to_thread(self._executor.shutdown)

    def _attached(self, job: PrefillJob, order: PrefillOrder) -> JobStream:
        stream = job.attach(order)
        self.look_again()
        return stream

    def _waiting(self) -> list[PrefillJob]:
        return [job for job in self._jobs.values() if not job.is_started]

    def _wait_of(self, job: PrefillJob) -> Wait:
        return wait_of(job, self._jobs.values(), memory_bytes=self._memory_bytes)

    def _step_next(self) -> None:
        jobs = self._jobs.values()
        while (job := next_job(jobs, memory_bytes=self._memory_bytes)) is None:
            if (idle := job_in_the_way(jobs)) is None:
                return
            self._forget(idle)
        num_steps, steps_s = job.steps_within(QUANTUM_S)
        charge(jobs, job, steps_s)
        if not job.is_started:
            job.start(_begin(self._engine, job.token_ids, job.sparse, job.cancelled))
            for other in self._waiting():
                if other.stream is not None:
                    other.stream.news.set()
        assert job.run is not None
        self._stepping = job
        order = _StepOrder(
            run=job.run,
            encoder=job.encoder,
            epoch=job.epoch,
            since=job.acknowledged,
            last=job.end,
            num_steps=num_steps,
            room_bytes=job.room_bytes,
        )
        step = self._executor.submit(_steps, order, self._clock)
        step.add_done_callback(lambda done: self._events.call_soon_threadsafe(self._stepped, job, done))

    def _stepped(self, job: PrefillJob, done: "Future[_Steps]") -> None:
        self._stepping = None
        error = done.exception()
        if self._jobs.get(job.transfer_id) is job:
            if error is None:
                steps = done.result()
                work = job.produce(steps.tiles, steps.end)
                if job.sparse is None:  # a plan leaves out what the model counts
                    self._costs.observe(work, steps.took_s)
            else:
                del self._jobs[job.transfer_id]
                job.fail(error)
        self.look_again()

    def _forget(self, job: PrefillJob) -> None:
        del self._jobs[job.transfer_id]
        job.cancel()

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
            del self._jobs[job.transfer_id]
            job.drop(
                ReaderStalled(
                    f"the reader of transfer {job.transfer_id!r} has stored nothing for {limit_s:g} s{why}; "
                    f"prefill.stall_s={self._stall_s:g}"
                )
            )
        return ends_s

    def _look_again_when(self, stalls_end_s: list[float], now_s: float) -> None:
        """Look again when the next stall or lease is over."""
        if self._timer is not None:
            self._timer.cancel()
        ends_s = stalls_end_s + [job.lease_ends_s for job in self._jobs.values() if job.lease_ends_s is not None]
        self._timer = self._events.call_later(min(ends_s) - now_s, self.look_again) if ends_s else None


def _begin(
    engine: PrefillEngine, token_ids: NDArray[np.int64], sparse: PromptPlans | None, cancelled: CancelFlag
) -> Iterator[KvTile]:
    """The engine's run, called by whoever asks for its first tile: the engine's thread."""
    yield from engine.run(token_ids, sparse=sparse, cancelled=cancelled)


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepOrder:
    """What the engine's thread is to do for one job."""

    run: Iterator[KvTile]
    encoder: TileEncoder
    epoch: int
    since: KvPosition
    """Messages begin here."""
    last: KvPosition
    """Where the job ends."""
    num_steps: int
    room_bytes: int
    """Messages that fill the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """What it has done."""

    tiles: list[EncodedTile]
    end: KvPosition
    """Of the last tile."""
    took_s: float


def _steps(order: _StepOrder, clock: Clock) -> _Steps:
    """Compute tiles and make their messages, until there are enough or the window is full."""
    began_s, tiles, num_bytes = clock.now(), list[EncodedTile](), 0
    for _ in range(order.num_steps):
        tile = next(order.run, None)
        assert tile is not None, "the engine ended before its last tile"
        end = KvPosition(tile.layer, tile.first_token).after(tile.num_tokens, order.encoder.num_tokens)
        encoded = order.encoder.encode(tile, epoch=order.epoch, since=order.since)
        tiles += encoded
        num_bytes += sum(len(each.message) for each in encoded)
        # A plan's tiles may be longer than those that were counted.
        if num_bytes >= order.room_bytes or end == order.last:
            break
    return _Steps(tiles=tiles, end=end, took_s=clock.now() - began_s)
