"""What the engine's thread makes for jobs: steps of their runs, and the messages of the tiles that these bring."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from colm.clock import Clock
from colm.kv import KvTile
from colm.kv_position import KV_START, KvPosition
from colm.wire.shared_memory import SharedMemory
from prefill_node.encoded_tile import EncodedTile, TileEncoder
from prefill_node.engine import PrefillEngine
from prefill_node.prefill_job import PrefillJob
from prefill_node.prefill_run import PrefillRun
from prefill_node.prefix_cache import PrefixHold


@dataclass(kw_only=True, slots=True)
class Making:
    """What the engine's thread makes for one job, and what it has made; nobody else's while it does."""

    run: PrefillRun
    encoder: TileEncoder
    hold: PrefixHold
    epoch: int
    since: KvPosition
    """Messages begin here."""
    num_pauses: int
    """Steps without a tile since the last tile."""
    last: KvPosition
    """Where the job ends."""
    room_bytes: int
    """Messages that fill the window."""
    memory: SharedMemory | None
    """Where payloads go, if their reader reads there."""
    tiles: list[EncodedTile] = field(default_factory=list)
    end: KvPosition = KV_START
    """Of the last tile."""

    @classmethod
    def of(cls, job: PrefillJob) -> "Making":
        """Nothing yet."""
        assert job.run is not None
        return cls(
            run=job.run,
            encoder=job.encoder,
            hold=job.hold,
            epoch=job.epoch,
            since=job.acknowledged,
            num_pauses=job.num_pauses,
            last=job.end,
            room_bytes=job.room_bytes,
            memory=job.read_memory,
        )

    @property
    def must_stop(self) -> bool:
        """There is nothing more to make, or no room for it."""
        return self.run.error is not None or self.room_bytes <= 0 or self.end == self.last

    def keep(self, tile: KvTile) -> None:
        """Make the tile's messages."""
        self.end = KvPosition(tile.layer, tile.first_token).after(tile.num_tokens, self.encoder.num_tokens)
        self.num_pauses = 0 if tile.num_tokens else self.num_pauses + 1
        encoded = self.encoder.encode(tile, epoch=self.epoch, since=self.since, memory=self.memory)
        self.hold.keep(tile)
        self.tiles += encoded
        self.room_bytes -= sum(each.held_bytes for each in encoded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What the engine's thread has done."""

    makings: Sequence[Making]
    took_s: float


def make_steps(engine: PrefillEngine, makings: Sequence[Making], num_steps: int, clock: Clock) -> Steps:
    """Compute tiles and make their messages, until there are enough or one of the jobs must stop."""
    began_s = clock.now()
    for _ in range(num_steps):
        for making, tile in zip(makings, engine.step([each.run for each in makings]), strict=True):
            if tile is not None:
                with making.run.own_errors():
                    making.keep(tile)
        # A plan's tiles may be longer than those that were counted.
        if any(making.must_stop for making in makings):
            break
    return Steps(makings=makings, took_s=clock.now() - began_s)
