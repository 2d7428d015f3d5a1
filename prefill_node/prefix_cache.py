"""Keys and values of prompts that were computed, kept for prompts that begin alike.

A prompt is cut into the engine's tiles. A tile's key stands for the whole prefix that the tile ends (`colm/prefix.py`).
Prompts of the same key have the same keys and values, to the bit: the engine computes a tile from what lies before it
alone, in the same rows. The first key hashes what else they depend on: weights and format (the fingerprint), dense
attention, and the salt of whose prompt it is. A prompt's last tile may be shorter; its key then stands for prompts that
end there.

Tiles that a later prompt has read are not pushed out by new ones (`colm/segmented_lru.py`). A tile counts as used later
than those that follow it, so a chain is evicted from its end: it has no hole, and no tile that nobody can find.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colm.kv import KvFormat, KvTile
from colm.placement import CPU
from colm.prefix import block_digests, root_digest
from colm.segmented_lru import SegmentedLru


@dataclass(eq=False, kw_only=True, slots=True)
class KeptTile:
    """Keys and values of one tile, layer by layer."""

    key: bytes
    parent: bytes
    """Key of the tile before it; of the first one, its own."""
    first_token: int
    num_tokens: int
    num_bytes: int
    """Once all layers are there; counted from the start."""
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(k_KTE, v_KTE); complete when it is found, and never written again."""
    num_holders: int = 0
    """Jobs that read it; not evicted meanwhile."""

    def tile(self, layer: int) -> KvTile:
        """Of one layer, as it was computed."""
        return KvTile(layer, self.first_token, *self.layers[layer])


@dataclass(eq=False, kw_only=True, slots=True)
class PrefixHold:
    """What one job has of the cache: the tiles that it reads, and new ones behind them that it fills."""

    keys: Sequence[bytes] = ()
    """Of all of the prompt's tiles; none for a prompt of which nothing is kept."""
    num_tokens: int = 0
    """Of the prompt."""
    read: list[KeptTile] = field(default_factory=list)
    filled: list[KeptTile] = field(default_factory=list)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, those that need not be computed."""
        return sum(kept.num_tokens for kept in self.read)

    def keep(self, tile: KvTile) -> None:
        """Copy what was computed, if there is room for it; called by the engine's thread."""
        if self.filled and tile.num_tokens and tile.first_token >= self.filled[0].first_token:
            number = (tile.first_token - self.filled[0].first_token) // self.filled[0].num_tokens
            if number < len(self.filled):
                k_KTE, v_KTE = (each.clone(memory_format=torch.contiguous_format) for each in tile.tensors)
                self.filled[number].layers.append((k_KTE, v_KTE))


@dataclass(slots=True)
class PrefixCounts:
    """What the cache has done since it began; tokens are those of prompts that began."""

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_evicted_tiles: int = 0


class PrefixCache:
    """Owned by one event loop; only `PrefixHold.keep` is called elsewhere.

    Args:
        kv_format: of the engine.
        tile_tokens: of the engine.
        budget_bytes: for everything that is kept, or is being filled; 0 keeps nothing.
        fingerprint: of what the engine serves.
        device: of the engine, where all of it lies.
    """

    def __init__(
        self,
        kv_format: KvFormat,
        *,
        tile_tokens: int,
        budget_bytes: int,
        fingerprint: str = "",
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self._kv_format = kv_format
        self._tile_tokens = tile_tokens
        self._budget_bytes = budget_bytes
        self._fingerprint = fingerprint
        self._tiles: dict[bytes, KeptTile] = {}
        self._lru: SegmentedLru[bytes] = SegmentedLru(budget_bytes)
        self.held_bytes = 0
        """Of all tiles that are kept or being filled."""
        self.counts = PrefixCounts()

    def hold(self, token_ids: NDArray[np.int64], salt: bytes) -> PrefixHold:
        """The longest prefix of a prompt that is kept; to be given back with `close`."""
        if not self._budget_bytes:
            return PrefixHold()
        root = root_digest(self._fingerprint, "dense", salt.hex())
        hold = PrefixHold(keys=[*block_digests(root, token_ids, self._tile_tokens)], num_tokens=len(token_ids))
        self.look_again(hold)
        return hold

    def look_again(self, hold: PrefixHold) -> bool:
        """Whether more of the prompt is kept by now; before its job begins."""
        num_before = len(hold.read)
        for key in hold.keys[num_before:]:
            if (kept := self._tiles.get(key)) is None:
                break
            kept.num_holders += 1
            hold.read.append(kept)
        return len(hold.read) > num_before

    def begin(self, hold: PrefixHold, *, is_alone: bool) -> None:
        """A job begins: count what it finds, and make room for the rest of its prompt, as far as there is any.

        Args:
            hold: the job's.
            is_alone: it shares no step. What it computes in company is not kept, as in `abandon`.
        """
        if not hold.keys:
            return
        self.counts.num_queried_tokens += hold.num_tokens
        self.counts.num_hit_tokens += hold.num_cached_tokens
        self._fill(hold, len(hold.keys) if is_alone else 0)

    def expect(self, hold: PrefixHold, end_token: int) -> None:
        """Make room for whole tiles up to a token that come from elsewhere before the job begins, if there is any.

        Each is `arrived` once it is whole; `abandon` ends it.
        """
        self._fill(hold, end_token // self._tile_tokens)

    def arrived(self, hold: PrefixHold) -> None:
        """The first of the tiles that a hold fills is whole: it is kept, and the hold reads it."""
        kept = hold.filled.pop(0)
        if kept.key in self._tiles:  # another job has filled the same one meanwhile
            self.held_bytes -= kept.num_bytes
        else:
            self._tiles[kept.key] = kept
            self._lru.add(kept.key, kept.num_bytes)
        self.look_again(hold)

    def _fill(self, hold: PrefixHold, end: int) -> None:
        """Make room for a hold's tiles up to a number, behind those that it reads."""
        for number in range(len(hold.read), end):
            first = number * self._tile_tokens
            num_tokens = min(self._tile_tokens, hold.num_tokens - first)
            num_bytes = num_tokens * self._kv_format.token_bytes
            if not self._make_room(num_bytes):
                break
            self.held_bytes += num_bytes
            hold.filled.append(
                KeptTile(
                    key=hold.keys[number],
                    parent=hold.keys[max(0, number - 1)],
                    first_token=first,
                    num_tokens=num_tokens,
                    num_bytes=num_bytes,
                )
            )

    def abandon(self, hold: PrefixHold) -> None:
        """Fill no more: what the job computes from here on differs by rounding from what it would compute alone."""
        self.held_bytes -= sum(kept.num_bytes for kept in hold.filled)
        hold.filled = []

    def settle(self, hold: PrefixHold) -> None:
        """The job fills nothing any more: keep what it has filled to the last layer, and forget the rest."""
        filled, hold.filled = hold.filled, []
        for kept in reversed(filled):  # the end of the chain is the first to go
            is_whole = len(kept.layers) == self._kv_format.num_layers
            # Another job may have filled the same one meanwhile; it is used as this one would be.
            has_twin = kept.key in self._tiles
            if is_whole and not has_twin:
                self._tiles[kept.key] = kept
                self._lru.add(kept.key, kept.num_bytes)
                continue
            self.held_bytes -= kept.num_bytes
            if has_twin:
                self._lru.refresh(kept.key)

    def close(self, hold: PrefixHold) -> None:
        """The job uses nothing any more, what it reads included."""
        self.settle(hold)
        read, hold.read = hold.read, []
        for kept in reversed(read):
            kept.num_holders -= 1
            self._lru.use(kept.key)

    def _make_room(self, num_bytes: int) -> bool:
        while self.held_bytes + num_bytes > self._budget_bytes:
            evicted = next((key for key in self._lru.on_probation if not self._tiles[key].num_holders), None)
            if evicted is None:
                return False
            self._lru.remove(evicted)
            self.held_bytes -= self._tiles.pop(evicted).num_bytes
            self.counts.num_evicted_tiles += 1
        return True

    def check_integrity(self, holds: Collection[PrefixHold]) -> None:
        """Assert that bytes and holders are those of the tiles and of the open holds, and that no chain has a hole."""
        tiles = self._tiles
        self._lru.check_integrity()
        assert {*self._lru} == tiles.keys()
        filled = [kept for hold in holds for kept in hold.filled]
        assert self.held_bytes == sum(kept.num_bytes for kept in [*tiles.values(), *filled]) <= self._budget_bytes
        holders = Counter(kept.key for hold in holds for kept in hold.read)
        assert holders == Counter({key: kept.num_holders for key, kept in tiles.items() if kept.num_holders})
        for kept in tiles.values():
            assert len(kept.layers) == self._kv_format.num_layers
            assert kept.parent in tiles or not kept.first_token
