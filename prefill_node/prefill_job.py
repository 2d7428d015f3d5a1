"""A prompt on its way through the engine, apart from whoever reads what comes out.

[0, acknowledged)          the reader has stored it; forgotten here
[acknowledged, produced)   in the window, as messages
[produced, end)            not made yet

Messages come from two threads: of tiles that were kept from an earlier prompt from one that needs no engine, of all
others from the engine's. `prefill_node/tile_window.py` puts them in order.
"""

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
from prefill_node.job_stream import JobStream
from prefill_node.prefill_run import PrefillRun
from prefill_node.prefix_cache import PrefixHold
from prefill_node.sparse.prompt_plans import PromptPlans
from prefill_node.tile_window import TileWindow


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
        """It holds memory: tiles may be made of it."""
        self.is_begun = False
        """What is kept of it is settled: the engine has begun, or need not."""
        self.stalled_since_s: float | None = None
        """Since when the reader alone can go on; None while the engine can. Written by the loop."""
        self.end = KvPosition(kv_format.num_layers, 0)
        self._costs = costs
        self._is_ever_planned = order.sparse is not None and order.sparse.covers_any(len(order.token_ids))
        self._begun_bytes = begun_bytes
        self._num_pauses = 0
        self.hold = hold or PrefixHold()
        self.num_cached_tokens = self.hold.num_cached_tokens
        """Of the prompt, those that the engine need not compute."""
        self._computed = self._begin
        """Where the engine's last tile ended; 0 in a layer stands for all that is kept of it."""
        self._window = TileWindow(
            self.encoder, end=self.end, acknowledged=order.resume_from, num_kept_tokens=self.num_cached_tokens
        )
        self._work_left = self._work_from(KV_START, 0)
        self._step_share = self._share_of_step()
        self._on_change = on_change

    @property
    def acknowledged(self) -> KvPosition:
        """What lies before it has been stored by the reader."""
        return self._window.acknowledged

    @property
    def is_computed(self) -> bool:
        """There is nothing to compute any more."""
        return self.end in (self._computed, self.acknowledged)

    @property
    def is_made(self) -> bool:
        """Every tile is in the window, or has been stored."""
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
        """More of the prompt is kept than was known; before it has begun, though kept tiles may have been sent."""
        produced = self._produced
        self._begun_bytes, self.num_cached_tokens = begun_bytes, self.hold.num_cached_tokens
        self._computed = self._begin
        self._window.find_kept(self.num_cached_tokens, produced)
        self._work_left = self._work_from(KV_START, 0)
        self._tell()

    @property
    def has_reader(self) -> bool:
        """A stream is attached that takes tiles: none of its prompt's beginning is on its way up any more."""
        return self.stream is not None and not self.stream.awaits_prefix

    @property
    def has_room(self) -> bool:
        """The window takes another tile of the engine's."""
        return self.room_bytes > 0

    @property
    def is_full(self) -> bool:
        """Nothing is made any more before the reader has stored some."""
        return (self.is_computed or not self.has_room) and self.next_kept is None

    @property
    def waits_for_reader(self) -> bool:
        """It holds tiles, and nothing can be done for it until its reader has stored some."""
        return self.has_reader and self.window_bytes > 0 and self.is_full

    @property
    def window_bytes(self) -> int:
        """Messages that are not acknowledged."""
        return self._window.held_bytes

    @property
    def room_bytes(self) -> int:
        """What the window takes of the engine's before it is full; the tile that fills it may be larger."""
        return self._room_of(is_kept=False)

    @property
    def kept_room_bytes(self) -> int:
        """The same, of kept tiles."""
        return self._room_of(is_kept=True)

    @property
    def sends_kept(self) -> bool:
        """Some of what is kept of the prompt is to be sent."""
        return self._window.sends_kept

    @property
    def next_kept(self) -> KvPosition | None:
        """Where the next kept tile begins that can be made now; None where none can."""
        at = self._window.next_kept
        return at if at < self.kept_end and self.kept_room_bytes > 0 else None

    @property
    def kept_end(self) -> KvPosition:
        """How far kept tiles are in order: none is made before the engine's tiles that go before it."""
        if self._computed == self.end:
            return self.end
        if self.num_cached_tokens < len(self.token_ids):
            return self._computed.at_least(self.num_cached_tokens)
        # The word behind a prompt that was kept whole must come before the stream's end.
        return KvPosition(self.end.layer - 1, 0)

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
        return self._computed.layer

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
        if self.run is None or self._produced != self._computed.at_least(self.num_cached_tokens):
            return self._produced
        before, after = self._step_share
        share = before + (after - before) * self.cancelled.done_share
        num_tile_tokens = min(self.run.tile_tokens, self.run.num_tokens - self._produced.token)
        return self._produced.after(int(share * num_tile_tokens), self.run.num_tokens)

    @property
    def memory_bytes(self) -> int:
        """What the job holds; before its last tile, as much as it will hold at most."""
        return self.window_bytes if self.is_made else self._begun_bytes

    def works_ahead(self) -> Iterator[Work]:
        """What each step takes that is still to be made."""
        at = (self._computed, self._num_pauses)
        while at[0] < self.end:
            after = self._costs.shape.after_pause(*at, len(self.token_ids), self.sparse, self.num_cached_tokens)
            yield self._work_before(*after) - self._work_before(*at)
            at = after

    def start(self) -> None:
        """Tiles that are kept may be made."""
        self.is_started = True
        self._tell()

    def begin(self, run: PrefillRun | None) -> None:
        """The first step is about to be made; None where none need be, since all is kept."""
        self.is_begun, self.run = True, run
        self.start()

    @property
    def num_pauses(self) -> int:
        """Steps since the last tile that brought none."""
        return self._num_pauses

    def produce(self, tiles: list[EncodedTile], produced: KvPosition, num_pauses: int = 0) -> Work:
        """Note what the engine's steps have brought: messages of what had not been acknowledged, and how far they went.

        Args:
            tiles: the messages.
            produced: where the last tile ended.
            num_pauses: steps since then that brought none.

        Returns:
            What the engine has done for it.
        """
        work = self._work_before(produced, num_pauses) - self._work_before(self._computed, self._num_pauses)
        self._computed, self._num_pauses = produced, num_pauses
        # Anew, since what is expected of a sparse layer changes once it has been planned.
        self._work_left = self._work_from(produced, num_pauses)
        self._step_share = self._share_of_step()
        if self.is_computed:
            self.next_token_id = None if self.run is None else self.run.next_token_id
            self.run = None
        self._window.add_computed(tiles)
        self._tell()
        return work

    def add_kept(self, tiles: list[EncodedTile], end: KvPosition) -> None:
        """Note messages of kept tiles, made from `next_kept` on, and where the last one ended."""
        self._window.add_kept(tiles, end)
        self._tell()

    def fail(self, error: BaseException) -> None:
        """End with an error, which the reader gets after the tiles that there are."""
        self.error = error
        self.cancel()

    def drop(self, error: BaseException) -> None:
        """End with an error at once: the tiles that there are go too, and a reader that does not take them."""
        self._window.clear()
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
        self._window.acknowledge(order.resume_from)
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
        self._window.acknowledge(position)
        self._on_change()

    def tile(self, number: int) -> EncodedTile | None:
        """A tile of the window by its number, counted over all that were produced; None if it is yet to come."""
        return self._window.tile(number)

    @property
    def read_memory(self) -> SharedMemory | None:
        """The shared memory, while the reader reads there."""
        return self.memory if self.stream is not None and self.stream.reads_memory else None

    @property
    def first_number(self) -> int:
        """Number of the window's first tile, be it there or still to come."""
        return self._window.num_dropped

    def check_integrity(self) -> None:
        """Assert that the window is what lies between `acknowledged` and what was produced, once and in order."""
        self._window.check_integrity(self._produced, self._computed)

    @property
    def _begin(self) -> KvPosition:
        """Where the engine begins: at the end, if nothing is to be computed and no word to be said."""
        is_kept = self.num_cached_tokens == len(self.token_ids) and self.last_token_id is None
        return self.end if is_kept else KV_START

    @property
    def _produced(self) -> KvPosition:
        return min(self._window.next_kept, self.kept_end)

    def _room_of(self, *, is_kept: bool) -> int:
        limit_bytes = WINDOW_BYTES if self.read_memory is None else min(WINDOW_BYTES, SHARED_WINDOW_BYTES)
        return self._window.room_bytes(limit_bytes, is_kept=is_kept)

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
        tile, here = self._computed, (self._computed, self._num_pauses)
        step, next_tile = shape.after_pause(*here, num_tokens, self.sparse), shape.after_step(tile, num_tokens)
        places = (tile, 0), here, step, (next_tile, 0)
        last_s, here_s, step_s, next_s = (self._costs.seconds(self._work_before(*place)) for place in places)
        if (whole_s := next_s - last_s) <= 0:
            return 0.0, 1.0
        # A plan may take more steps than were expected.
        return min((here_s - last_s) / whole_s, 1.0), min((step_s - last_s) / whole_s, 1.0)

    def _tell(self) -> None:
        if self.stream is not None:
            self.stream.news.set()
