"""A decode node without an engine: the real pages, line and scheduler; the steps' time is modelled.

Real: `decode_node.page_line` with its pool and cache, `decode_node.scheduler` with its places and plans, and
`ServePrefillPool`, which borrows a prefill node. Modelled here: what a step takes (`costs`), and that answers have the
length that the workload says. Nothing is drafted, no scale changes, no prompts share pages.

The scheduler is asked for a step once for all steps that it would plan alike: until an answer ends or another one
joins. Between the first and the last of them, contexts grow by a token a step, and so does their time, linearly.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log, sqrt
from typing import Final

import numpy as np
from colm_kernels.decode_attention import MAX_QUERY_TOKENS

from bench.simulate.costs import Costs, DecodeWork
from bench.simulate.network import Link
from bench.simulate.prefill_model import PrefillModel
from bench.simulate.processor import Processor
from bench.simulate.requests import SimRequest
from cluster.replicas.decode import ServePrefillPool
from colm.errors import CapacityExceeded
from decode_node.page_line import PageLine
from decode_node.page_pool import PagePool
from decode_node.plan import PlanRow
from decode_node.prefix_cache import PagesWanted
from decode_node.scheduler import Scheduler, Step
from decode_node.step_budget import StepBudget

_NO_TABLE: Final = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """Of one node; the options of the same names."""

    num_pages: int
    page_tokens: int
    max_requests: int
    max_batch_size: int
    max_local_prefill_tokens: int
    budget: StepBudget
    """Tokens of a step; a real node measures it."""


@dataclass(eq=False, slots=True)
class _Answer:
    """`decode_node.scheduler.Answer`, of a length that is known."""

    request: SimRequest
    num_unread: int
    """Tokens up to and with the newest that the cache does not hold."""
    done: asyncio.Future[None]
    num_made: int = 0
    num_drafts: int = 0

    @property
    def num_chains(self) -> int:
        return self.request.num_chains

    @property
    def num_left(self) -> int:
        return self.request.num_new_tokens - self.num_made

    def draft_row(self, num_answers: int) -> PlanRow | None:  # noqa: ARG002 - the scheduler's contract
        return None

    def next_rows(self, max_tokens: int) -> list[PlanRow]:
        """As `RunningAnswer` makes them: the newest token at the answer's scale, others before it in pieces."""
        end = self.request.num_prompt_tokens + self.num_made
        first, num_earlier = end - self.num_unread, self.num_unread - 1
        rows = [PlanRow((0,), end - 1, self.num_chains, _NO_TABLE)] if max_tokens > num_earlier else []
        num_read = min(num_earlier, max_tokens)
        for start in range(0, num_read, MAX_QUERY_TOKENS):
            size = min(MAX_QUERY_TOKENS, num_read - start)
            rows.append(PlanRow((0,) * size, first + start, 1, _NO_TABLE, num_logits=0))
        return rows

    def advance(self, num_tokens: int) -> int:
        """Note that steps have read so many tokens; returns how many they have made."""
        made = max(0, num_tokens - (self.num_unread - 1))
        self.num_unread -= num_tokens - made
        self.num_made += made
        return made


@dataclass(slots=True)
class DecodeCounts:
    """What a node has done."""

    num_steps: int = 0
    num_tokens: int = 0
    engine_s: float = 0.0
    page_s: float = 0.0
    """Pages in use, integrated over time."""


@dataclass(slots=True)
class _Run:
    """Steps that are planned alike."""

    step: Step[_Answer]
    began_s: float
    num_steps: int
    first_s: float
    slope_s: float
    """By which each step is longer than the one before."""
    timer: asyncio.TimerHandle | None = None

    def seconds(self, num_steps: int) -> float:
        return num_steps * self.first_s + self.slope_s * num_steps * (num_steps - 1) / 2

    def steps_begun(self, passed_s: float) -> int:
        """How many steps have begun after some seconds; at least one."""
        if self.slope_s <= 0:
            begun = passed_s / self.first_s
        else:
            half = self.first_s - self.slope_s / 2
            begun = (sqrt(half * half + 2 * self.slope_s * passed_s) - half) / self.slope_s
        return max(1, min(self.num_steps, ceil(begun - 1e-9)))


class DecodeModel:
    """One decode node. Lives on the simulation's loop.

    Args:
        address: names it.
        costs: what steps take.
        limits: of the node.
        prefill_pool: lends prefill nodes.
        prefill_nodes: by address.
        processor: makes its steps.
        bytes_per_s: of its link.
        gaps: told of the time between tokens: seconds, and how often.
    """

    def __init__(
        self,
        address: str,
        costs: Costs,
        limits: DecodeLimits,
        prefill_pool: ServePrefillPool,
        prefill_nodes: dict[str, PrefillModel],
        *,
        processor: Processor,
        bytes_per_s: float,
        gaps: "Gaps",
    ) -> None:
        self.address = address
        self.counts = DecodeCounts()
        self.link = Link(bytes_per_s)
        self.page_line = PageLine(PagePool(limits.num_pages), max_waiting=limits.max_requests)
        self._costs = costs
        self.max_batch_size = limits.max_batch_size
        self._limits = limits
        self.prefill_pool = prefill_pool
        self._prefill_nodes = prefill_nodes
        self._processor = processor
        self._gaps = gaps
        self._loop = asyncio.get_running_loop()
        self._scheduler = Scheduler[_Answer](max_batch_size=limits.max_batch_size, budget=limits.budget)
        self._run: _Run | None = None
        self.num_requests = 0

    async def serve(self, request: SimRequest, *, only_if_room: bool) -> None:
        """Serve a request to its end, and note its times.

        Raises:
            CapacityExceeded: as `decode_node.requests` does.
        """
        if self.num_requests >= self._limits.max_requests:
            raise CapacityExceeded(f"decode node {self.address} has {self.num_requests} requests")
        num_tokens = request.num_prompt_tokens + request.num_new_tokens
        wanted = PagesWanted(num_pages=-(-num_tokens // self._limits.page_tokens))
        self.num_requests += 1
        lease = None
        try:
            reservation = self.page_line.reserve_now(request.name, wanted)
            if reservation is None:
                if only_if_room:
                    raise CapacityExceeded(f"decode node {self.address} has no pages free")
                reservation = await self.page_line.reserve(request.name, wanted, _no_beat)
            lease = reservation.lease
            request.reserved_s = self._loop.time()
            await self._prefill(request)
            await self._decode(request)
        finally:
            self.num_requests -= 1
            if lease is not None:
                self.counts.page_s += lease.num_pages * (self._loop.time() - request.reserved_s)
                self.page_line.release(lease)

    async def _prefill(self, request: SimRequest) -> None:
        if request.num_prompt_tokens <= self._limits.max_local_prefill_tokens:
            return
        num_tokens, refused = request.num_prompt_tokens - 1, list[str]()
        while True:
            try:
                async with self.prefill_pool.lease(
                    num_tokens=num_tokens, beat=_no_beat, preferred=None, refused_by=refused
                ) as lease:
                    try:
                        await self._prefill_nodes[lease.address].prefill(num_tokens, self.link)
                    except CapacityExceeded:
                        refused.append(lease.address)
                        raise
            except CapacityExceeded:
                if not refused or lease.address != refused[-1]:
                    raise
            else:
                request.prefilled_s = self._loop.time()
                return

    async def _decode(self, request: SimRequest) -> None:
        is_local = request.num_prompt_tokens <= self._limits.max_local_prefill_tokens
        answer = _Answer(request, request.num_prompt_tokens if is_local else 1, self._loop.create_future())
        self._scheduler.join(answer)
        if self._run is None:
            self._begin()
        elif len({*self._run.step.answers}) < self._limits.max_batch_size:
            self._shorten(self._run)
        await answer.done

    def _begin(self) -> None:
        if (step := self._scheduler.begin_step()) is None:
            self._run = None
            return
        answers, rows = step.answers, step.plan.rows
        is_plain = all(len(row.token_ids) == row.num_logits == 1 for row in rows)
        num_steps = 1 if self._processor.is_shared or not is_plain else min(each.num_left for each in answers)
        first_s = self._costs.decode_step_s(_work(rows, 0))
        slope_s = 0.0
        if num_steps > 1:
            slope_s = (self._costs.decode_step_s(_work(rows, num_steps - 1)) - first_s) / (num_steps - 1)
        self._run = run = _Run(step, self._loop.time(), num_steps, first_s, slope_s)
        if self._processor.is_shared:
            self._processor.run([first_s], self._ended, num_answers=len({*answers}))
        else:
            run.timer = self._loop.call_later(run.seconds(num_steps), self._ended)

    def _shorten(self, run: _Run) -> None:
        """End the run with the step that runs now: the next one has somebody more."""
        if run.timer is None or (num_steps := run.steps_begun(self._loop.time() - run.began_s)) == run.num_steps:
            return
        run.timer.cancel()
        run.num_steps = num_steps
        run.timer = self._loop.call_at(run.began_s + run.seconds(num_steps), self._ended)

    def _ended(self) -> None:
        assert self._run is not None
        run, now_s = self._run, self._loop.time()
        took_s = now_s - run.began_s
        step_s, num_read = took_s / run.num_steps, Counter[_Answer]()
        for answer, row in zip(run.step.answers, run.step.plan.rows, strict=True):
            num_read[answer] += len(row.token_ids)
        self.counts.num_steps += run.num_steps
        self.counts.engine_s += took_s
        num_gaps = 0
        for answer, num_tokens in num_read.items():
            request, is_first = answer.request, answer.num_made == 0
            made = answer.advance(run.num_steps * num_tokens)
            self.counts.num_tokens += made
            if is_first and made:
                request.first_token_s = run.began_s + took_s * run.seconds(1) / run.seconds(run.num_steps)
            if made > is_first:
                request.longest_gap_s = max(request.longest_gap_s, step_s)
                num_gaps += made - is_first
            if answer.num_left == 0:
                request.last_token_s = now_s
                self._scheduler.leave(answer)
        self._gaps.add(step_s, num_gaps)
        for answer in self._scheduler.end_step():
            answer.done.set_result(None)
        self._begin()


@dataclass(slots=True)
class Gaps:
    """Times between tokens, of all answers: counted in bins of 2%."""

    num: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float, count: int) -> None:
        """Note a time that came so often."""
        if count:
            bin_ = round(log(seconds) / _BIN)
            self.num[bin_] = self.num.get(bin_, 0) + count

    def percentile(self, percent: int) -> float | None:
        """The time that so many in 100 do not exceed; None without any."""
        left = -(-percent * sum(self.num.values()) // 100)
        for bin_ in sorted(self.num):
            left -= self.num[bin_]
            if left <= 0:
                return float(np.exp(bin_ * _BIN))
        return None


_BIN: Final = 0.02


def _work(rows: Sequence[PlanRow], num_steps_before: int) -> DecodeWork:
    num_tokens: dict[int, int] = {}
    for row in rows:
        num_tokens[row.num_chains] = num_tokens.get(row.num_chains, 0) + len(row.token_ids)
    contexts = sum(row.position + len(row.token_ids) for row in rows) + num_steps_before * len(rows)
    return DecodeWork(num_tokens=num_tokens, num_context_tokens=contexts)


async def _no_beat(num_ahead: int) -> None:
    pass
