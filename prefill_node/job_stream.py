"""One reader of a prefill job: what it has taken, what it is told, and how it ends."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from colm.errors import InvalidRequest, PeerUnavailable, TransferSuperseded
from colm.kv_position import KvPosition
from colm.line import wait_at_most
from colm.wire.shared_memory import SharedMemory
from prefill_node.encoded_tile import EncodedTile
from prefill_node.prefix_uplink import PrefixUplink

if TYPE_CHECKING:
    from prefill_node.prefill_job import PrefillJob, PrefillOrder

MAX_SHARED_TILES = 8
"""In one message. Where a payload lies in shared memory, gRPC and two event loops cost more than its copies."""
PROGRESS_INTERVAL_S = 0.5
"""How often a reader that waits for a tile is told how far it is."""

Progress = Callable[[KvPosition], Awaitable[None]]
"""Told how far the computation is inside a tile, whenever that has grown."""


class JobStream:
    """One reader of a job's tiles, from a position on."""

    def __init__(self, job: "PrefillJob", order: "PrefillOrder") -> None:
        self.job = job
        self.news = asyncio.Event()
        """Set whenever there may be something to take or to say."""
        self.break_off: Callable[[], None] = lambda: None
        """Called when the job is dropped, also while the reader is in the middle of a write."""
        self.reads_memory = False
        """The reader has opened the job's shared memory."""
        self.takes_several = False
        """The reader takes several tiles of that memory in one message."""
        self.uplink: PrefixUplink | None = None
        """Brings up what the job lacks of its prompt's beginning; None where it lacks nothing, or computes it."""
        self.awaited: PrefixUplink | None = None
        """Another stream's, which brings the same."""
        self.held_tokens = order.held_tokens
        """Of the prompt, what the caller can send up."""
        # Asked of this job, and not of one that another stream had begun for less.
        self._wants_next_token = order.last_token_id is not None and order.last_token_id == job.last_token_id
        self._epoch = order.epoch
        self._read = order.resume_from
        self._told = order.resume_from
        self._number = job.first_number
        self._is_asked = False
        self._has_ended = False
        self._error: BaseException | None = None

    @property
    def awaits_prefix(self) -> bool:
        """The prompt's beginning is on its way up."""
        return any(each is not None and not each.is_over for each in (self.uplink, self.awaited))

    def end(self, error: BaseException | None) -> None:
        """The reader acknowledges nothing more; with an error, it gets nothing more either."""
        self._has_ended, self._error = True, error
        self.news.set()

    def require_current(self) -> None:
        """Refuse to go on for a stream whose job has been taken over, or given up.

        Raises:
            TransferSuperseded: a newer stream reads the job.
            BaseException: what the stream ended with, or what the job failed with.
        """
        if self._error is not None:
            raise self._error
        if self.job.stream is not self:
            raise TransferSuperseded(f"transfer {self.job.transfer_id!r} is read in epoch {self.job.epoch} by now")
        if self.job.error is not None:
            raise self.job.error

    def take(self) -> EncodedTile | None:
        """The next tile, if it is there.

        Raises:
            TransferSuperseded: a newer stream reads the job.
            PeerUnavailable: the tile was damaged where it waited; the job is dropped.
        """
        if self.job.stream is not self or (tile := self.job.tile(self._number)) is None:
            self.require_current()
            return None
        # A tile of this epoch lies in shared memory only if this stream's reader reads there.
        if tile.epoch != self._epoch or tile.begin < self._read:
            try:
                tile = self.job.encoder.reissue(tile, epoch=self._epoch, since=self._read, is_shared=self.reads_memory)
            except PeerUnavailable as damage:
                # Another exception: this one holds its frames, and they hold the tile.
                self.job.drop(PeerUnavailable(str(damage)))
                raise
        self._number += 1
        self._read = tile.end
        return tile

    def take_shared(self) -> list[EncodedTile]:
        """What may share a message with a tile of shared memory: more such tiles, as many as are there.

        Raises:
            PeerUnavailable: a tile was damaged where it waited; the job is dropped.
        """
        taken: list[EncodedTile] = []
        while self.takes_several and len(taken) < MAX_SHARED_TILES - 1 and self.job.stream is self:
            if (waiting := self.job.tile(self._number)) is None or waiting.slot is None:
                break
            if (tile := self.take()) is not None:
                taken.append(tile)
        return taken

    def take_next_token(self) -> int | None:
        """What chain 1 says behind the prompt's last token: once it is there, once, and if this stream wants it."""
        if not self._wants_next_token or self.job.next_token_id is None:
            return None
        self._wants_next_token = False
        return self.job.next_token_id

    async def tiles(self, progress: Progress | None = None) -> AsyncIterator[EncodedTile]:
        """Read to the end.

        Args:
            progress: told while the next tile is waited for, every `PROGRESS_INTERVAL_S`; never of less than before.

        Raises:
            TransferSuperseded: a newer stream reads the job.
            InvalidRequest: the window is full, and the reader will not acknowledge anything more.
            BaseException: what the stream ended with; what the job failed with, after its tiles.
        """
        while self._read < self.job.end:
            self.news.clear()
            if (tile := self.take()) is not None:
                yield tile
            elif self._has_ended and self.job.is_full:
                raise InvalidRequest(
                    "acknowledged",
                    self.job.acknowledged,
                    f"the caller closed its side; with {self.job.window_bytes} unacknowledged bytes no more is sent",
                )
            elif progress is None:
                await self.news.wait()
            else:
                await wait_at_most(self.news, PROGRESS_INTERVAL_S)
                if (reached := self.job.reached) > max(self._told, self._read) and not self.news.is_set():
                    self._told = reached
                    await progress(reached)

    async def until_stored(self) -> None:
        """Wait until the reader has acknowledged everything, or will acknowledge nothing more.

        Raises:
            TransferSuperseded: a newer stream reads the job.
            BaseException: what the stream ended with.
        """
        while not self.job.is_over:
            self.news.clear()
            self.require_current()
            if self._has_ended:
                return
            await self.news.wait()

    def share(self) -> SharedMemory:
        """Memory of the job, for the reader to open; it holds payloads only once `answer` has said that it has.

        Raises:
            OSError: there is none to be had, or nothing that could go there.
        """
        job = self.job
        if job.memory is None:
            if job.is_made or job.cancelled.is_set():  # nothing is made any more, or nobody would close it
                raise OSError("no tile is to come")
            job.memory = job.encoder.share(job.tile_tokens)
        self._is_asked = True
        return job.memory

    def answer(self, *, is_mapped: bool, takes_several: bool = False) -> None:
        """Whether the reader has opened the memory, and takes several of its tiles in one message.

        Raises:
            InvalidRequest: it was not asked, or has answered already.
        """
        if not self._is_asked:
            raise InvalidRequest("shared_memory", is_mapped, "answers an event that has not come")
        self._is_asked, self.reads_memory, self.takes_several = False, is_mapped, is_mapped and takes_several

    def acknowledge(self, position: KvPosition) -> None:
        """Everything before a position has been stored.

        Raises:
            InvalidRequest: it lies before an earlier one, or was not sent on this stream.
            TransferSuperseded: a newer stream reads the job.
        """
        self.require_current()
        if not self.job.acknowledged <= position <= self._read:
            raise InvalidRequest(
                "acknowledged", position, f"must lie between {self.job.acknowledged} and {self._read}, which was sent"
            )
        self.job.acknowledge(position)
