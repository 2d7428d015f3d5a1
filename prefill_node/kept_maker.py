"""Messages of tiles that were kept from an earlier prompt: a thread of its own makes them, since they need no engine.

It reads the tiles where the cache has them, which nobody writes any more, and nothing of a job that the engine's thread
touches.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from colm_kernels.native import CancelFlag

from colm.kv_position import KvPosition
from colm.wire.shared_memory import SharedMemory
from prefill_node.encoded_tile import MESSAGE_BYTES, EncodedTile, TileEncoder
from prefill_node.prefill_job import PrefillJob
from prefill_node.prefix_cache import KeptTile

KEPT_BYTES = 4 * MESSAGE_BYTES
"""Of kept tiles' messages, before another job is asked; a layer of a tile is never divided."""


@dataclass(kw_only=True, slots=True)
class KeptMaking:
    """Messages of a job's kept tiles, some of them at once."""

    kept: Sequence[KeptTile]
    """From the prompt's beginning on."""
    encoder: TileEncoder
    epoch: int
    since: KvPosition
    """Messages begin here."""
    stop: KvPosition
    """How far they may go."""
    room_bytes: int
    """They are enough once these are filled."""
    memory: SharedMemory | None
    cancelled: CancelFlag
    end: KvPosition
    """Of the last tile, in its layer; at first, where the first begins."""
    messages: list[EncodedTile] = field(default_factory=list)

    @classmethod
    def of(cls, job: PrefillJob) -> "KeptMaking":
        """Nothing yet; of a job that has a `next_kept`."""
        begin = job.next_kept
        assert begin is not None
        return cls(
            kept=tuple(job.hold.read),
            encoder=job.encoder,
            epoch=job.epoch,
            since=job.acknowledged,
            stop=job.kept_end,
            room_bytes=min(KEPT_BYTES, job.kept_room_bytes),
            memory=job.read_memory,
            cancelled=job.cancelled,
            end=begin,
        )

    def make(self) -> None:
        """Make them.

        Raises:
            NotFinite: a tile cannot be sent.
        """
        tile_tokens, at = self.kept[0].num_tokens, self.end
        while at < self.stop and self.room_bytes > 0 and not self.cancelled.is_set():
            kept = self.kept[at.token // tile_tokens]
            messages = self.encoder.encode(kept.tile(at.layer), epoch=self.epoch, since=self.since, memory=self.memory)
            self.messages += messages
            self.room_bytes -= sum(each.held_bytes for each in messages)
            # Not the next layer's begin: meanwhile more of this one may have been found.
            self.end = at = KvPosition(at.layer, kept.first_token + kept.num_tokens)
            if kept is self.kept[-1]:
                at = KvPosition(at.layer + 1, self.encoder.first_token)


class KeptMaker:
    """Has messages made for one job after the other. Lives on the jobs' loop.

    Args:
        on_made: told what was made for a job, or what it failed with; once `reading` is another one's, or nobody's.
    """

    def __init__(self, on_made: Callable[[PrefillJob, KeptMaking, BaseException | None], None]) -> None:
        self.reading: PrefillJob | None = None
        """Whose kept tiles the thread reads."""
        self._on_made = on_made
        self._last_place = -1
        self._events = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kept")

    def make_next(self, jobs: Iterable[PrefillJob]) -> None:
        """Begin with the next job in turn that has kept tiles to send, unless the thread is busy."""
        if self.reading is not None:
            return
        ready = [job for job in jobs if job.is_started and job.has_reader and job.next_kept is not None]
        if not ready:
            return
        self.reading = job = min(ready, key=lambda each: (each.place <= self._last_place, each.place))
        self._last_place = job.place
        making = KeptMaking.of(job)
        made = self._executor.submit(making.make)
        made.add_done_callback(lambda done: self._events.call_soon_threadsafe(self._made, job, making, done))

    async def stop(self) -> None:
        """End the thread."""
        await asyncio.to_thread(self._executor.shutdown)

    def _made(self, job: PrefillJob, making: KeptMaking, done: "Future[None]") -> None:
        self.reading = None
        self._on_made(job, making, done.exception())
