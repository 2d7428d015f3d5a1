"""Checks the order of a transfer's tiles, over all of its KV streams. No tensors, no gRPC.

Tiles come layer by layer and, within a layer, in token order:

    [0, layer)           complete
    layer: [0, token)    arrived
    layer: [token, N)    expected next
    (layer, L)           not begun

In a transfer that begins at a token, no layer has tiles before it.

A broken stream leaves the ledger as it is. The next stream has a newer epoch and brings the rest.
"""

from dataclasses import dataclass

from colm.errors import PeerUnavailable
from colm.kv_position import KV_START, KvPosition


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """The fields of a tile's header that the ledger checks."""

    transfer_id: str
    epoch: int
    layer: int
    first_token: int
    num_tokens: int
    payload_bytes: int
    effective_bytes: int
    """What it takes in pages."""
    is_shared: bool = False
    """The payload lay in shared memory."""


class TransferLedger:
    """Admits the tiles of one transfer: from its newest stream only, in order, without gaps or overlaps."""

    def __init__(
        self,
        *,
        transfer_id: str,
        num_layers: int,
        num_tokens: int,
        first_token: int = 0,
    ) -> None:
        self.transfer_id = transfer_id
        self.first_token = first_token
        """What lies before it is in the pages already."""
        self.epoch = 0
        """Epoch of the newest stream; 0 before the first."""
        self.position = KV_START
        """Everything before this position has arrived."""
        self.num_tiles = 0
        """Tiles admitted in this epoch."""
        self.payload_bytes = 0
        """Bytes of those tiles, as they were sent."""
        self.shared_bytes = 0
        """Of those, the bytes that lay in shared memory."""
        self.effective_bytes = 0
        """Bytes of those tiles in pages."""
        self._reached = KV_START
        self._num_layers = num_layers
        self._num_tokens = num_tokens

    def begin(self) -> int:
        """Begin a new epoch and return it; tiles of older ones are refused from here on."""
        self.epoch += 1
        self.num_tiles = self.payload_bytes = self.shared_bytes = self.effective_bytes = 0
        return self.epoch

    @property
    def is_whole(self) -> bool:
        """Whether every layer of every token has arrived."""
        return self.position.layer == self._num_layers

    @property
    def num_tokens_done(self) -> int:
        """Tokens arrived or, inside a tile, said to be reached; averaged over layers. Never falls."""
        layer, token = max(self.position, self._reached)
        return (layer * self._num_tokens + token) // self._num_layers

    def reach(self, position: KvPosition) -> None:
        """Note how far the sender says that it is; nothing has arrived with it.

        Raises:
            PeerUnavailable: it is no place in this transfer.
        """
        layer, token = position
        is_inside = token < self._num_tokens and position <= (self._num_layers, 0)
        self._expect(is_inside, f"layer {layer} token {token} is reached, of {self._num_layers} layers")
        self._reached = max(self._reached, position)

    def require_next(self, arrival: Arrival) -> KvPosition:
        """Refuse a tile that must not be written into the pages.

        Returns:
            Where the next tile begins, and this one does.

        Raises:
            PeerUnavailable: another tile must come next.
        """
        self._expect_ours("tile", arrival.transfer_id, arrival.epoch)
        self._expect(not self.is_whole, "tile after the last one")
        layer, token = next_tile = self.position.at_least(self.first_token)
        self._expect(
            (arrival.layer, arrival.first_token) == next_tile,
            f"tile at layer {arrival.layer} token {arrival.first_token}, expected layer {layer} token {token}",
        )
        left = self._num_tokens - token
        self._expect(1 <= arrival.num_tokens <= left, f"tile of {arrival.num_tokens} tokens where {left} are left")
        return next_tile

    def admit(self, arrival: Arrival) -> None:
        """Count a tile that lies whole in its pages.

        Raises:
            PeerUnavailable: another tile must come next; the ledger stays as it is.
        """
        self.position = self.require_next(arrival).after(arrival.num_tokens, self._num_tokens)
        self.num_tiles += 1
        self.payload_bytes += arrival.payload_bytes
        self.shared_bytes += arrival.payload_bytes if arrival.is_shared else 0
        self.effective_bytes += arrival.effective_bytes

    def complete(
        self, *, transfer_id: str, epoch: int, num_tiles: int, payload_bytes: int, shared_bytes: int = 0
    ) -> None:
        """Check the sender's counts, its last message, against what has arrived.

        Raises:
            PeerUnavailable: something is missing, or the counts differ.
        """
        self._expect_ours("completion", transfer_id, epoch)
        layer, token = self.position
        self._expect(self.is_whole, f"complete after layer {layer} token {token}")
        self._expect(
            (num_tiles, payload_bytes) == (self.num_tiles, self.payload_bytes),
            f"{num_tiles} tiles and {payload_bytes} bytes sent, {self.num_tiles} and {self.payload_bytes} arrived",
        )
        self._expect(
            shared_bytes == self.shared_bytes, f"{shared_bytes} bytes shared, {self.shared_bytes} were read there"
        )

    def _expect_ours(self, what: str, transfer_id: str, epoch: int) -> None:
        self._expect(transfer_id == self.transfer_id, f"{what} of transfer {transfer_id!r}")
        self._expect(epoch == self.epoch, f"{what} of epoch {epoch}, this is {self.epoch}")

    def _expect(self, condition: bool, problem: str) -> None:
        if not condition:
            raise PeerUnavailable(f"the prefill node broke the KV stream's order: {problem}")
