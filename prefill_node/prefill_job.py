"""A prompt on its way through the engine, apart from whoever reads what comes out.

[0, acknowledged)          the reader has stored it; forgotten here
[acknowledged, produced)   in the window, as messages
[produced, end)            not computed yet
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from colm_kernels.native import CancelFlag
from numpy.typing import NDArray

from colm.errors import TransferSuperseded
from colm.events import SparseReport
from colm.kv import KvFormat
from colm.kv_position import KV_START, KvPosition
from colm.request import KvCodec
from colm.wire.shared_memory import SHARED_WINDOW_BYTES, SharedMemory
from colm.wire.tile_codec import WINDOW_BYTES
from prefill_node.cost_model import CostModel, Work
from prefill_node.encoded_tile import EncodedTile, TileEncoder
from prefill_node.engine import PrefillEngine
from prefill_node.job_stream import JobStream
from prefill_node.prefill_run import PrefillRun
from prefill_node.prefix_cache import PrefixHold
from prefill_node.sparse.prompt_plans import PromptPlans


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillOrder:
    """What a stream asks for."""

    transfer_id: str
    epoch: int
    token_ids: NDArray[np.int64]
    resume_from: KvPosition = KV_START
    """The first thing that the stream has to bring."""
    sparse: PromptPlans | None = None
    """Plans the prompt's attention; None for dense. A job keeps those of the order that it began with."""
    codec: KvCodec = "raw"
    """Of the tiles; a job keeps that of the order that it began with."""
    first_token: int = 0
    """What lies before it is not sent, in any layer; whole tiles."""
    cache_salt: bytes = b""
    """Prompts of other salts share nothing with this one."""
    held_tokens: int = 0
    """Of the prompt, the first ones, whose keys and values the caller can send up; whole tiles."""
    last_token_id: int | None = None
    """The token behind the prompt, if the stream shall bring what chain 1 says next; a job keeps that of its first."""


class PrefillJob:
    """Bookkeeping of one prompt. Lives on one event loop; the engine's thread never touches it.

    Args:
        order: of the stream that asks first.
        place: in line.
        kv_format: of the engine.
        costs: of the engine.
        begun_bytes: of `job_bytes`.
        on_change: told whenever another job may be next.
        hold: what is kept of its prompt; None for nothing. Its owner closes it.
    """

    def __init__(
        self,
        order: PrefillOrder,
        *,
        place: int,
        kv_format: KvFormat,
        costs: CostModel,
        begun_bytes: int,
        on_change: Callable[[], None],
        hold: PrefixHold | None = None,
    ) -> None:
        self.transfer_id = order.transfer_id
        self.token_ids = order.token_ids
        self.sparse = order.sparse
        self.place = place
        self.owed_s = 0.0
        self.epoch = -1
        """Of the stream that came last."""
        self.cancelled = CancelFlag()
        self.encoder = TileEncoder(
            transfer_id=order.transfer_id,
            num_tokens=len(order.token_ids),
            kv_format=kv_format,
            codec=order.codec,
            first_token=order.first_token,
        )
        self.cache_salt = order.cache_salt
        self.last_token_id = order.last_token_id
        self.next_token_id: int | None = None
        """What chain 1 says behind it, once all is computed."""
        self.memory: SharedMemory | None = None
        """Holds the window's payloads that were made while their reader read there; None before it is offered."""
        self.run: PrefillRun | None = None
        """The engine's; None before the job has begun and after its last tile."""
        self.lease_ends_s: float | None = None
        """When the job is given up; None while a stream is attached."""
        self.stream: JobStream | None = None
        self.error: BaseException | None = None
        """What the job failed with."""
        self.is_started = False
        self.stalled_since_s: float | None = None
        """Since when the reader alone can go on; None while the engine can. Written by the loop."""
        self.acknowledged = order.resume_from
        self.end = KvPosition(kv_format.num_layers, 0)
        self._costs = costs
        self._is_ever_planned = order.sparse is not None and order.sparse.covers_any(len(order.token_ids))
        self._begun_bytes = begun_bytes
        self._produced = KV_START
        self._num_pauses = 0
        self.hold = hold or PrefixHold()
        self.num_cached_tokens = self.hold.num_cached_tokens
        """Of the prompt, those that the engine need not compute."""
        self._work_left = self._work_from(KV_START, 0)
        self._step_share = self._share_of_step()
        self._window: deque[EncodedTile] = deque()
        self._num_dropped = 0
        self._window_bytes = 0
        self._on_change = on_change

    @property
    def is_computed(self) -> bool:
        """There is nothing to compute any more."""
        return self.end in (self._produced, self.acknowledged)

    @property
    def is_over(self) -> bool:
        """Every tile has been stored by the reader."""
        return self.acknowledged == self.end

    @property
    def sparse_report(self) -> SparseReport | None:
        """What became of sparse attention; None with dense attention, and where nothing had to be computed."""
        return self.sparse.report() if self.sparse is not None and self.is_started else None

    @property
    def num_computed_tokens(self) -> int:
        """Of the prompt, what the engine has computed or will; 0 where all had been stored before it began."""
        return len(self.token_ids) - self.num_cached_tokens if self.is_started else 0

    def find_more(self, begun_bytes: int) -> None:
        """More of the prompt is kept than was known; before it begins."""
        self._begun_bytes, self.num_cached_tokens = begun_bytes, self.hold.num_cached_tokens
        self._work_left = self._work_from(KV_START, 0)
        self._tell()

    @property
    def has_reader(self) -> bool:
        """A stream is attached that takes tiles: none of its prompt's beginning is on its way up any more."""
        return self.stream is not None and not self.stream.awaits_prefix

    @property
    def has_room(self) -> bool:
        """The window takes another tile."""
        return self.room_bytes > 0

    @property
    def waits_for_reader(self) -> bool:
        """It holds tiles, and nothing can be done for it until its reader has stored some."""
        return self.has_reader and self._window_bytes > 0 and (self.is_computed or not self.has_room)

    @property
    def window_bytes(self) -> int:
        """Messages that are not acknowledged."""
        return self._window_bytes

    @property
    def room_bytes(self) -> int:
        """What the window takes before it is full; the tile that fills it may be larger."""
        window_bytes = WINDOW_BYTES if self.read_memory is None else min(WINDOW_BYTES, SHARED_WINDOW_BYTES)
        return window_bytes - self._window_bytes

    @property
    def remaining_s(self) -> float:
        """Engine time that is still to come."""
        return 0.0 if self.is_computed else self._costs.seconds(self._work_left)

    @property
    def shared_s(self) -> float:
        """Of `remaining_s`, what its steps do not add to another job's with which they are made as one."""
        return self._costs.shared_s(self._work_left)

    @property
    def layer(self) -> int:
        """Of the next step."""
        return self._produced.layer

    @property
    def tile_rows(self) -> int | None:
        """The prompt's length, where its steps may be shared: it is one tile, not kept or planned; else None."""
        num_tokens = len(self.token_ids)
        is_one_tile = num_tokens <= self._costs.shape.tile_tokens
        may_share = is_one_tile and not self._is_ever_planned and not self.num_cached_tokens
        return num_tokens if may_share else None

    @property
    def tile_tokens(self) -> int:
        """Of the engine."""
        return self._costs.shape.tile_tokens

    @property
    def reached(self) -> KvPosition:
        """How far the computation is, as if the next tile came token by token with the work on it."""
        if self.run is None:
            return self._produced
        before, after = self._step_share
        share = before + (after - before) * self.cancelled.done_share
        num_tile_tokens = min(self.run.tile_tokens, self.run.num_tokens - self._produced.token)
        return self._produced.after(int(share * num_tile_tokens), self.run.num_tokens)

    @property
    def memory_bytes(self) -> int:
        """What the job holds; before its last tile, as much as it will hold at most."""
        return self._window_bytes if self.is_computed else self._begun_bytes

    def works_ahead(self) -> Iterator[Work]:
        """What each step takes that is still to be made."""
        at = (self._produced, self._num_pauses)
        while at[0] < self.end:
            after = self._costs.shape.after_pause(*at, len(self.token_ids), self.sparse)
            yield self._work_before(*after) - self._work_before(*at)
            at = after

    def start(self, run: PrefillRun) -> None:
        """The first step is about to be made."""
        self.is_started, self.run = True, run
        self._tell()

    @property
    def num_pauses(self) -> int:
        """Steps since the last tile that brought none."""
        return self._num_pauses

    def produce(self, tiles: list[EncodedTile], produced: KvPosition, num_pauses: int = 0) -> Work:
        """Note what steps have brought: messages of what had not been acknowledged, and how far they went.

        Args:
            tiles: the messages.
            produced: where the last tile ended.
            num_pauses: steps since then that brought none.

        Returns:
            What the engine has done for it.
        """
        work = self._work_before(produced, num_pauses) - self._work_before(self._produced, self._num_pauses)
        self._produced, self._num_pauses = produced, num_pauses
        # Anew, since what is expected of a sparse layer changes once it has been planned.
        self._work_left = self._work_from(produced, num_pauses)
        self._step_share = self._share_of_step()
        if self.is_computed:
            self.next_token_id = None if self.run is None else self.run.next_token_id
            self.run = None
        for tile in tiles:
            # A step that had begun before a newer stream came may bring what that one has from elsewhere.
            if tile.end <= self.acknowledged:
                tile.let_go()
            else:
                self._window.append(tile)
                self._window_bytes += tile.held_bytes
        self._tell()
        return work

    def fail(self, error: BaseException) -> None:
        """End with an error, which the reader gets after the tiles that there are."""
        self.error = error
        self.cancel()

    def drop(self, error: BaseException) -> None:
        """End with an error at once: the tiles that there are go too, and a reader that does not take them."""
        self._window.clear()
        self._window_bytes = 0
        self.fail(error)
        if self.stream is not None:
            self.stream.break_off()
        self._on_change()

    def cancel(self) -> None:
        """Give the work up, wherever it is; nothing of it is held but by a step that still runs."""
        self.cancelled.set()
        self.run = None
        if self.memory is not None:
            self.memory.close()
        self._tell()

    def can_resume(self, order: PrefillOrder) -> bool:
        """Whether what is held, and what is still to come, is all that the order asks for."""
        # Dense and sparse tiles do not fit together above layer 0; tiles that wait are written in the job's codec.
        is_same = (self.sparse is None) == (order.sparse is None) and np.array_equal(self.token_ids, order.token_ids)
        is_same = is_same and (self.encoder.first_token, self.cache_salt) == (order.first_token, order.cache_salt)
        return is_same and self.encoder.codec == order.codec and self.acknowledged <= order.resume_from

    def attach(self, order: PrefillOrder) -> JobStream:
        """Let a stream read from the order's position on; an older one ends.

        Raises:
            TransferSuperseded: the order is not newer than the stream that came last.
        """
        self.require_newer(order)
        older, self.epoch, self.lease_ends_s = self.stream, order.epoch, None
        self.stalled_since_s = None
        self.acknowledged = order.resume_from
        self._drop_stored()
        self.stream = JobStream(self, order)
        if older is not None:
            older.news.set()
        return self.stream

    def require_newer(self, order: PrefillOrder) -> None:
        """Refuse an order that is older than the stream that came last, or the same.

        Raises:
            TransferSuperseded: it is.
        """
        if order.epoch <= self.epoch:
            raise TransferSuperseded(
                f"transfer {self.transfer_id!r} is read in epoch {self.epoch} already, this is {order.epoch}"
            )

    def acknowledge(self, position: KvPosition) -> None:
        """Forget what lies before a position; the reader has stored it."""
        if position > self.acknowledged:
            self.stalled_since_s = None
        self.acknowledged = position
        self._drop_stored()
        self._on_change()

    def tile(self, number: int) -> EncodedTile | None:
        """A tile of the window by its number, counted over all that were produced; None if it is yet to come."""
        index = number - self._num_dropped
        return self._window[index] if index < len(self._window) else None

    @property
    def read_memory(self) -> SharedMemory | None:
        """The shared memory, while the reader reads there."""
        return self.memory if self.stream is not None and self.stream.reads_memory else None

    @property
    def first_number(self) -> int:
        """Number of the window's first tile, be it there or still to come."""
        return self._num_dropped

    def check_integrity(self) -> None:
        """Assert that the window is what lies between `acknowledged` and what was produced, once and in order."""
        assert self._window_bytes == sum(tile.held_bytes for tile in self._window)
        first_token = self.encoder.first_token
        position = self.acknowledged.at_least(first_token)
        for tile in self._window:
            assert tile.begin <= position < tile.end
            position = tile.end.at_least(first_token)
        assert position == max(self._produced, self.acknowledged).at_least(first_token)

    def _work_from(self, position: KvPosition, num_pauses: int) -> Work:
        return self._work_before(self.end, 0) - self._work_before(position, num_pauses)

    def _work_before(self, position: KvPosition, num_pauses: int) -> Work:
        shape, num_tokens = self._costs.shape, len(self.token_ids)
        if self.sparse is None:
            return shape.work_before(position, num_tokens, self.num_cached_tokens)
        return shape.sparse_work_before(position, num_pauses, num_tokens, self.sparse)

    def _share_of_step(self) -> tuple[float, float]:
        """Of the work between the last tile and the next one, what is done before and after the next step."""
        if self.sparse is None or self.is_computed:
            return 0.0, 1.0
        shape, num_tokens = self._costs.shape, len(self.token_ids)
        tile, here = self._produced, (self._produced, self._num_pauses)
        step, next_tile = shape.after_pause(*here, num_tokens, self.sparse), shape.after_step(tile, num_tokens)
        places = (tile, 0), here, step, (next_tile, 0)
        last_s, here_s, step_s, next_s = (self._costs.seconds(self._work_before(*place)) for place in places)
        if (whole_s := next_s - last_s) <= 0:
            return 0.0, 1.0
        # A plan may take more steps than were expected.
        return min((here_s - last_s) / whole_s, 1.0), min((step_s - last_s) / whole_s, 1.0)

    def _drop_stored(self) -> None:
        while self._window and self._window[0].end <= self.acknowledged:
            tile = self._window.popleft()
            self._window_bytes -= tile.held_bytes
            self._num_dropped += 1
            tile.let_go()

    def _tell(self) -> None:
        if self.stream is not None:
            self.stream.news.set()


def job_bytes(
    engine: PrefillEngine,
    num_tokens: int,
    sparse: PromptPlans | None = None,
    num_cached_tokens: int = 0,
    *,
    reads_last_token: bool = False,
) -> int:
    """What a job of so many tokens holds at most once it has begun: a run, a pack's rows, and a full window."""
    kv_format, tile_bytes = engine.kv_format, min(num_tokens, engine.tile_tokens) * engine.kv_format.layer_token_bytes
    window_bytes = min(num_tokens * kv_format.token_bytes, WINDOW_BYTES + tile_bytes)
    run_bytes = engine.memory_bytes(
        num_tokens, sparse, num_cached_tokens=num_cached_tokens, reads_last_token=reads_last_token
    )
    return run_bytes + engine.pack_bytes(num_tokens) + window_bytes
