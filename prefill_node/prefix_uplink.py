"""Brings a prompt's beginning up from the decode node that holds it, where that takes less time than to compute it.

    [0, first)         kept here before
    [first, stored)    has come up, is kept, and may be found by others
    [stored, said)     asked for: at most a window
    [said, end)        not asked for yet

Tiles come up whole, one after another, in all layers: what has come when a stream breaks need not come again. They go
where this node keeps what it has computed (ADR 39), whose room and salts bound them. Their job waits meanwhile, the
engine does not.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colm.clock import Clock
from colm.errors import PeerUnavailable
from colm.finite import is_finite
from colm.kv import KvFormat, KvTile
from colm.kv_position import KvPosition
from prefill_node.cost_model import CostModel
from prefill_node.prefix_cache import PrefixCache, PrefixHold

logger = logging.getLogger(__name__)

WINDOW_BYTES = 32 << 20
"""What may be on its way up; a tile in all layers at least."""
FLOOR_BYTES_S = 100e6
"""What a stream moves in a second before any was measured: a network of 1 Gbit/s, with a fifth for whatever else."""
IDLE_S = 5.0
"""Longest pause between two messages from below: as long as a node that lives may take to answer a ping."""
OUTCOMES = ("complete", "withdrawn", "refused", "late", "lost")
"""How an uplink may end: with all tiles; for want of more; at a wrong tile; too slowly; with its stream or job."""
_FORGETS = 0.5
"""What is left of an older measurement at each new one."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a decode node has to be told."""

    first_token: int
    """Where it begins."""
    end_token: int
    """How far it may send."""
    refusal: str = ""
    """Why nothing more is taken."""


@dataclass(slots=True)
class UplinkCounts:
    """What has come up since the node began."""

    num_bytes: int = 0
    num_tokens: int = 0
    """Of whole tiles."""
    ended: Counter[str] = field(default_factory=Counter)
    """Uplinks, by how they ended."""


class PrefixUplink:
    """One stream's bringing up of what its prompt's hold lacks. Lives on the loop of the cache.

    Args:
        hold: of the job that reads the tiles; filled with nothing else meanwhile.
        prefixes: has the hold, and room for what it fills.
        transfer_id: of the stream.
        epoch: of the stream.
        kv_format: of both ends.
        limit_s: what computing it would take: longer than that, or than `IDLE_S`, nobody waits.
        clock: measures that.
        on_change: called for each whole tile, and at the end unless that is `close`.
        note: told of the end.
    """

    def __init__(
        self,
        hold: PrefixHold,
        prefixes: PrefixCache,
        *,
        transfer_id: str,
        epoch: int,
        kv_format: KvFormat,
        limit_s: float,
        clock: Clock,
        on_change: Callable[[], None],
        note: Callable[["PrefixUplink"], None],
    ) -> None:
        first, last = hold.filled[0], hold.filled[-1]
        self._hold = hold
        self._prefixes = prefixes
        self._of_stream = transfer_id, epoch
        self._kv_format = kv_format
        self._limit_s = max(limit_s, IDLE_S)
        self._clock = clock
        self._on_change = on_change
        self._note = note
        self._tile_tokens = first.num_tokens
        self._window_tokens = max(1, WINDOW_BYTES // first.num_bytes) * first.num_tokens
        self._first_token = self._stored_token = first.first_token
        self._said_token = 0
        self._end_token = last.first_token + last.num_tokens
        self._next = KvPosition(0, first.first_token)
        self._layer: tuple[Tensor, Tensor] | None = None
        """Of the tile on its way, one that is not whole yet."""
        self._began_s = self._heard_s = clock.now()
        self._refusal = ""
        self.num_bytes = 0
        """Of payloads that have come."""
        self.outcome: str | None = None
        """How it ended; None while it goes on."""

    @property
    def is_over(self) -> bool:
        """Nothing more is taken."""
        return self.outcome is not None

    @property
    def num_tokens(self) -> int:
        """Of whole tiles that have come."""
        return self._stored_token - self._first_token

    @property
    def took_s(self) -> float:
        """Since it began."""
        return self._clock.now() - self._began_s

    @property
    def ends_s(self) -> float:
        """When nobody waits any more, by the clock."""
        return min(self._heard_s + IDLE_S, self._began_s + self._limit_s)

    def brings(self, key: bytes) -> bool:
        """A tile of that key is still to come."""
        return any(kept.key == key for kept in self._hold.filled)

    def take_word(self) -> Wanted | None:
        """What the decode node has to be told now; None for nothing new."""
        end_token = min(self._stored_token + self._window_tokens, self._end_token)
        if self.is_over:
            refusal, self._refusal = self._refusal, ""
            return Wanted(self._first_token, self._said_token, refusal) if refusal else None
        if end_token == self._said_token:
            return None
        self._said_token = end_token
        return Wanted(self._first_token, end_token)

    def take(self, tile: KvTile, *, transfer_id: str, epoch: int) -> None:
        """Store a piece that came undamaged; a wrong one ends the uplink, and those behind it are passed over.

        Args:
            tile: the piece.
            transfer_id: as its header says.
            epoch: likewise.
        """
        if self.is_over:
            return
        try:
            self._check(tile, (transfer_id, epoch))
        except PeerUnavailable as error:
            return self.refuse(str(error))
        self._heard_s = self._clock.now()
        self.num_bytes += tile.num_tokens * self._kv_format.layer_token_bytes
        if self._store(tile):
            if self._stored_token == self._end_token:
                self._end("complete")
            self._on_change()

    def refuse(self, why: str) -> None:
        """A piece was damaged, or none that may come."""
        if not self.is_over:
            self._end("refused", why)
            self._on_change()

    def withdraw(self) -> None:
        """The decode node sends no more."""
        if not self.is_over:
            self._end("withdrawn")
            self._on_change()

    def expire(self) -> None:
        """It has taken too long."""
        if not self.is_over:
            self._end("late", f"tokens {self._stored_token} to {self._end_token - 1} did not come up in time")
            self._on_change()

    def close(self) -> None:
        """The stream ends, or its job does."""
        if not self.is_over:
            self._end("lost")

    def _end(self, outcome: str, refusal: str = "") -> None:
        self.outcome, self._refusal, self._layer = outcome, refusal, None
        self._prefixes.abandon(self._hold)
        transfer_id, _ = self._of_stream
        logger.log(
            logging.WARNING if refusal else logging.INFO,
            "prefix.%s request=%s tokens=%d bytes=%d dur_ms=%.1f cause=%s",
            outcome,
            transfer_id,
            self.num_tokens,
            self.num_bytes,
            self.took_s * 1e3,
            refusal,
        )
        self._note(self)

    def _check(self, tile: KvTile, of_stream: tuple[str, int]) -> None:
        layer, token = self._next
        what = f"the tile at layer {tile.layer} token {tile.first_token}"
        if of_stream != self._of_stream:
            raise PeerUnavailable(f"{what} came up for transfer {of_stream[0]!r}, epoch {of_stream[1]}")
        if (tile.layer, tile.first_token) != self._next:
            raise PeerUnavailable(f"{what} came up where layer {layer} token {token} was expected")
        if tile.first_token >= self._said_token:
            raise PeerUnavailable(f"{what} came up before it was asked for")
        if tile.first_token + tile.num_tokens > self._stored_token + self._tile_tokens:
            raise PeerUnavailable(f"{what} came up with {tile.num_tokens} tokens, which end behind its own tile")
        if not all(map(is_finite, tile.tensors)):
            raise PeerUnavailable(f"{what} came up with NaN or infinities")

    def _store(self, tile: KvTile) -> bool:
        """Copy a piece to its place; returns whether its tile is whole now, in all layers."""
        kept = self._hold.filled[0]
        if self._layer is None:
            shape = (self._kv_format.num_kv_heads, kept.num_tokens, self._kv_format.head_dim)
            k_KTE, v_KTE = (
                torch.empty(shape, dtype=self._kv_format.dtype, device=self._prefixes.device) for _ in range(2)
            )
            self._layer = k_KTE, v_KTE
        start = tile.first_token - kept.first_token
        for whole_KTE, part_KTE in zip(self._layer, tile.tensors, strict=True):
            whole_KTE[:, start : start + tile.num_tokens] = part_KTE
        layer, token = tile.layer, tile.first_token + tile.num_tokens
        if token == kept.first_token + kept.num_tokens:
            kept.layers.append(self._layer)
            self._layer, layer, token = None, layer + 1, kept.first_token
        is_whole = layer == self._kv_format.num_layers
        if is_whole:
            self._prefixes.arrived(self._hold)
            layer, token = 0, kept.first_token + kept.num_tokens
            self._stored_token = token
        self._next = KvPosition(layer, token)
        return is_whole


class PrefixUplinks:
    """Begins uplinks where they are worth it, and counts them. Lives on the loop of the cache.

    Args:
        prefixes: takes what comes up.
        costs: of the engine, which would compute it otherwise.
        kv_format: of the engine.
        clock: measures what comes up.
    """

    def __init__(self, prefixes: PrefixCache, costs: CostModel, kv_format: KvFormat, clock: Clock) -> None:
        self._prefixes = prefixes
        self._costs = costs
        self._kv_format = kv_format
        self._clock = clock
        # A second at the floor, until something is measured.
        self._moved_bytes, self._moved_s = FLOOR_BYTES_S, 1.0
        self._running: list[PrefixUplink] = []
        self.counts = UplinkCounts()

    def begin(
        self,
        hold: PrefixHold,
        *,
        num_tokens: int,
        held_tokens: int,
        transfer_id: str,
        epoch: int,
        on_change: Callable[[], None],
    ) -> PrefixUplink | None:
        """Ask for what a hold lacks of what a decode node holds; None where it lacks nothing, or computes it sooner.

        Args:
            hold: of a job that has not begun.
            num_tokens: of its prompt.
            held_tokens: of those, the first ones that the decode node can send; whole tiles.
            transfer_id: of its stream.
            epoch: of its stream.
            on_change: as of `PrefixUplink`.
        """
        if not hold.keys or held_tokens <= hold.num_cached_tokens:
            return None
        limit_s = self._compute_s(num_tokens, hold.num_cached_tokens, held_tokens)
        num_bytes = (held_tokens - hold.num_cached_tokens) * self._kv_format.token_bytes
        if num_bytes * self._moved_s >= limit_s * self._moved_bytes:
            self._measure(FLOOR_BYTES_S, 1.0)  # a slow stream is not held against later ones for ever
            return None
        self._prefixes.expect(hold, held_tokens)
        if not hold.filled:
            return None
        uplink = PrefixUplink(
            hold,
            self._prefixes,
            transfer_id=transfer_id,
            epoch=epoch,
            kv_format=self._kv_format,
            limit_s=limit_s,
            clock=self._clock,
            on_change=on_change,
            note=self._ended,
        )
        self._running.append(uplink)
        return uplink

    def bringing(self, hold: PrefixHold) -> PrefixUplink | None:
        """The uplink that brings the next tile that a hold lacks, for a prompt that begins alike; None for none."""
        if len(hold.read) == len(hold.keys):
            return None
        key = hold.keys[len(hold.read)]
        return next((uplink for uplink in self._running if uplink.brings(key)), None)

    def _compute_s(self, num_tokens: int, num_cached_tokens: int, held_tokens: int) -> float:
        shape = self._costs.shape
        end = KvPosition(shape.num_layers, 0)
        without, with_it = (shape.work_before(end, num_tokens, num) for num in (num_cached_tokens, held_tokens))
        return self._costs.seconds(without) - self._costs.seconds(with_it)

    def _ended(self, uplink: PrefixUplink) -> None:
        assert uplink.outcome is not None
        self._running.remove(uplink)
        self.counts.ended[uplink.outcome] += 1
        self.counts.num_bytes += uplink.num_bytes
        self.counts.num_tokens += uplink.num_tokens
        if uplink.outcome in ("complete", "late"):
            self._measure(uplink.num_bytes, uplink.took_s)

    def _measure(self, num_bytes: float, took_s: float) -> None:
        self._moved_bytes = _FORGETS * self._moved_bytes + num_bytes
        self._moved_s = _FORGETS * self._moved_s + took_s
