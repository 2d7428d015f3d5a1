"""A prompt's messages that its reader has not stored yet, in the order of travel, whoever makes which of them when.

In each layer the tiles that were kept from an earlier prompt come before those that the engine computes:

[acknowledged, produced)   in the window
[produced, ..)             kept tiles to make, and the engine's messages behind them, which wait for these
"""

from collections import deque
from collections.abc import Sequence

from colm.kv_position import KvPosition
from prefill_node.encoded_tile import EncodedTile, TileEncoder


class TileWindow:
    """Bookkeeping of messages; nobody's thread but its job's owner's.

    Args:
        encoder: makes them.
        end: of the prompt.
        acknowledged: what the reader has from the start.
        num_kept_tokens: of the prompt, the first ones, whose tiles were kept.
    """

    def __init__(
        self, encoder: TileEncoder, *, end: KvPosition, acknowledged: KvPosition, num_kept_tokens: int
    ) -> None:
        self.acknowledged = acknowledged
        self.num_kept_tokens = num_kept_tokens
        self.num_dropped = 0
        """Messages that the reader has stored, or has from elsewhere."""
        self._first_token = encoder.first_token
        self._num_tokens = encoder.num_tokens
        self._end = end
        self.next_kept = self._kept_from(acknowledged)
        """The next kept tile to make; the end, or behind it, for none."""
        self._window: deque[EncodedTile] = deque()
        self._behind: deque[EncodedTile] = deque()
        """The engine's messages behind kept tiles that are not made yet."""
        self._held_bytes = {True: 0, False: 0}
        """By whether they are of kept tiles."""

    @property
    def held_bytes(self) -> int:
        """Of all messages."""
        return sum(self._held_bytes.values())

    @property
    def sends_kept(self) -> bool:
        """Some of what is kept of the prompt is to be sent."""
        return self._first_token < self.num_kept_tokens

    def tile(self, number: int) -> EncodedTile | None:
        """A message by its number, counted over all that were made; None if it is yet to come."""
        index = number - self.num_dropped
        return self._window[index] if index < len(self._window) else None

    def room_bytes(self, limit_bytes: int, *, is_kept: bool) -> int:
        """What fits of one kind into a window of so many bytes."""
        # Half for each, so that what waits behind kept tiles never takes the room for them.
        has_both = self.sends_kept and self.num_kept_tokens < self._num_tokens
        return -(-limit_bytes // (2 if has_both else 1)) - self._held_bytes[is_kept]

    def find_kept(self, num_kept_tokens: int, produced: KvPosition) -> None:
        """More of the prompt is kept than was known; before anything of it is computed."""
        self.num_kept_tokens = num_kept_tokens
        self.next_kept = max(self._kept_from(produced), self._kept_from(self.acknowledged))

    def add_computed(self, tiles: Sequence[EncodedTile]) -> None:
        """Take the engine's next messages."""
        self._behind += tiles
        self._held_bytes[False] += sum(tile.held_bytes for tile in tiles)
        self._move_up()

    def add_kept(self, tiles: Sequence[EncodedTile], end: KvPosition) -> None:
        """Take messages of kept tiles, from `next_kept` on, and where the last tile ended."""
        for tile in tiles:
            self.next_kept = max(self.next_kept, tile.begin)
            self._move_up()
            self._held_bytes[True] += tile.held_bytes
            self._put(tile)
        self.next_kept = max(self.next_kept, self._kept_from(end))
        self._move_up()

    def acknowledge(self, position: KvPosition) -> None:
        """Forget what lies before a position; the reader has it, be it from here or from elsewhere."""
        self.acknowledged = position
        while self._window and self._window[0].end <= position:
            self._let_go(self._window.popleft())
            self.num_dropped += 1
        self.next_kept = max(self.next_kept, self._kept_from(position))
        self._move_up()

    def clear(self) -> None:
        """Forget everything."""
        self._window.clear()
        self._behind.clear()
        self._held_bytes = {True: 0, False: 0}

    def check_integrity(self, produced: KvPosition, computed: KvPosition) -> None:
        """Assert that the window is what lies between `acknowledged` and what was produced, once and in order."""
        for is_kept, held_bytes in self._held_bytes.items():
            of_kind = [tile for tile in (*self._window, *self._behind) if self._is_kept(tile) is is_kept]
            assert held_bytes == sum(tile.held_bytes for tile in of_kind)
        assert all(self.next_kept < tile.begin < computed for tile in self._behind)
        position = self.acknowledged.at_least(self._first_token)
        for tile in self._window:
            assert tile.begin <= position < tile.end
            position = tile.end.at_least(self._first_token)
        assert position == max(produced, self.acknowledged).at_least(self._first_token)

    def _kept_from(self, position: KvPosition) -> KvPosition:
        if not self.sends_kept:
            return self._end
        position = position.at_least(self._first_token)
        if position.token < self.num_kept_tokens:
            return position
        return KvPosition(position.layer + 1, self._first_token)

    def _is_kept(self, tile: EncodedTile) -> bool:
        return tile.begin.token < self.num_kept_tokens

    def _move_up(self) -> None:
        while self._behind and self._behind[0].begin < self.next_kept:
            self._put(self._behind.popleft())

    def _put(self, tile: EncodedTile) -> None:
        # What had begun before a newer stream came may bring what that one has from elsewhere.
        if tile.end <= self.acknowledged:
            self._let_go(tile)
        else:
            self._window.append(tile)

    def _let_go(self, tile: EncodedTile) -> None:
        self._held_bytes[self._is_kept(tile)] -= tile.held_bytes
        tile.let_go()
