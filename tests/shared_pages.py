"""Pages that answers share as on a decode node: reservations and prefills are real, prompts come when a test says."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from numpy.typing import NDArray

from colm.errors import PrefillUnavailable
from colm.events import PrefillProgress, Queued
from decode_node.engine import DecodeEngine
from decode_node.kv_fetch import Emit, KvAccount, KvFetcher, KvOrder
from decode_node.kv_store import KvStore
from decode_node.page_line import PageLine
from decode_node.page_pool import PageLease, PagePool
from decode_node.plan import PlanRow, StepPlan
from decode_node.prefix_cache import PagesWanted, Reservation
from decode_node.prompt_blocks import PromptBlocks
from decode_node.shared_prefill import SharedPrefills
from tests.gates import settle


@dataclass(frozen=True)
class Reserved:
    """A request's pages, and what a prefill node is asked for; None for nothing."""

    reservation: Reservation
    order: KvOrder | None

    @property
    def pages(self) -> PageLease:
        """Those of the prompt and the whole answer."""
        return self.reservation.lease


@dataclass(eq=False)
class Arrival:
    """A prompt that a prefill node is asked for."""

    order: KvOrder
    is_here: "asyncio.Future[None]"


class SharedPages:
    """Lends a store's pages; stands for a `RequestOwner` up to the first step, and for the prefill nodes.

    Where a prefill node would send a prompt's keys and values, the engine computes them in the pages, through chain 1,
    in rows so few that each has the bits that it has anywhere.

    Args:
        tile_tokens: of the prefill nodes.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        store: KvStore,
        *,
        num_pages: int,
        max_idle_pages: int,
        tile_tokens: int,
    ) -> None:
        self.page_line = PageLine(PagePool(num_pages), max_waiting=0, max_idle_pages=max_idle_pages)
        self.arrivals: list[Arrival] = []
        self.num_found_tokens = 0
        """Of all prompts, those that were found in others' pages."""
        self.tile_tokens = tile_tokens
        self._engine, self._store = engine, store
        self._blocks = PromptBlocks(layout=store.layout, fingerprint="f")
        # All of a fetcher that `SharedPrefills` uses is here.
        self._prefills = SharedPrefills(cast(KvFetcher, self), self.page_line, store)
        self._loop = asyncio.new_event_loop()

    def reserve(self, prompt: Sequence[int], max_new_tokens: int, num_brought: int) -> Reserved | None:
        """Reserve a request's pages, which it must `bring` at once; None where too many are in use.

        Args:
            prompt: of the request.
            max_new_tokens: likewise.
            num_brought: tokens of the prompt that are there before its answer's first step.
        """
        token_ids = np.array(prompt[:num_brought], dtype=np.int64)
        wanted = PagesWanted(num_pages=self._store.layout.pages(len(prompt) + max_new_tokens))
        if len(token_ids):
            wanted = self._blocks.wanted(
                token_ids,
                num_tokens=len(prompt) + max_new_tokens,
                tile_tokens=self.tile_tokens,
                attention="dense",
                codec="raw",
                cache_salt=b"",
            )
        if (reservation := self.page_line.reserve_now("request", wanted)) is None:
            return None
        return Reserved(reservation, self._order(token_ids, wanted, reservation))

    def bring(self, reserved: Reserved, on_end: Callable[[bool], None]) -> "asyncio.Task[None]":
        """Have brought what the pages do not hold; `on_end` says that it is there or failed, unless it is cancelled."""
        task = self._loop.create_task(self._bring(reserved, on_end))
        self._settle()
        return task

    def arrive(self, arrival: Arrival, *, fails: bool = False) -> None:
        """Let a prompt come, or be given up by the prefill nodes."""
        self.arrivals.remove(arrival)
        if fails:
            arrival.is_here.set_exception(PrefillUnavailable("gave up"))
        else:
            self._compute(arrival.order)
            arrival.is_here.set_result(None)
        self._settle()

    def cancel(self, task: "asyncio.Task[None]") -> None:
        """End a request whose prompt is not there yet."""
        task.cancel()
        self._settle()

    def close(self) -> None:
        """Nothing may be held any more."""
        assert not self.arrivals
        assert not asyncio.all_tasks(self._loop)
        self.page_line.cache.check_integrity()
        assert self.page_line.pool.num_used == 0
        self._loop.close()

    async def fetch(self, order: KvOrder, account: KvAccount, emit: Emit) -> None:  # noqa: ARG002 - a fetcher's
        """A fetcher's: wait for the test."""
        arrival = Arrival(order, asyncio.get_running_loop().create_future())
        self.arrivals.append(arrival)
        try:
            await arrival.is_here
        except asyncio.CancelledError:
            self.arrivals.remove(arrival)
            raise
        account.tile_tokens.add(order.tile_tokens)

    def _order(self, token_ids: NDArray[np.int64], wanted: PagesWanted, reservation: Reservation) -> KvOrder | None:
        is_all = reservation.num_found == len(wanted.keys)
        num_whole_tokens = sum(wanted.sizes[: reservation.num_found]) * self._store.layout.page_tokens
        num_found = len(token_ids) if is_all else num_whole_tokens
        self.num_found_tokens += num_found
        if num_found == len(token_ids):
            return None
        return KvOrder(
            request_id="request",
            token_ids=token_ids,
            pages=reservation.lease,
            table_M=self._store.page_table(reservation.lease),
            first_token=num_found,
            tile_tokens=self.tile_tokens,
        )

    async def _bring(self, reserved: Reserved, on_end: Callable[[bool], None]) -> None:
        try:
            with self._prefills.of(reserved.reservation, reserved.order, KvAccount()) as follow:
                await follow(_nothing)
        except PrefillUnavailable:
            on_end(False)
        else:
            on_end(True)

    def _compute(self, order: KvOrder) -> None:
        for start in range(order.first_token, len(order.token_ids), MAX_QUERY_TOKENS):
            piece = tuple(order.token_ids[start : start + MAX_QUERY_TOKENS].tolist())
            self._engine.step(StepPlan((PlanRow(piece, start, 1, order.table_M, num_logits=0),)))

    def _settle(self) -> None:
        self._loop.run_until_complete(settle())


async def _nothing(_: PrefillProgress | Queued) -> Any:
    pass
