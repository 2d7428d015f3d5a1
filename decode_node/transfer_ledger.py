"""What the KV streams of a transfer must bring, in which order, and what they have brought. No tensors, no gRPC.

Tiles come layer by layer and, within a layer, in token order:

    [0, layer)           complete
    layer: [0, token)    arrived
    layer: [token, N)    expected next
    (layer, L)           not begun

A stream that breaks leaves the ledger as it is; the next one, of a newer epoch, brings the rest.
"""

from dataclasses import dataclass

from colm.errors import PeerUnavailable
from colm.kv_position import KV_START


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A tile's header, as far as the ledger cares."""

    transfer_id: str
    epoch: int
    layer: int
    first_token: int
    num_tokens: int
    payload_bytes: int


class TransferLedger:
    """Admits exactly the tiles of one transfer, each from the stream of the newest epoch, without gaps or overlaps."""

    def __init__(
        self,
        *,
        transfer_id: str,
        num_layers: int,
        num_tokens: int,
    ) -> None:
        self.transfer_id = transfer_id
        self.epoch = 0
        """Of the stream that is admitted now; 0 before the first."""
        self.position = KV_START
        """What lies before it has arrived."""
        self.num_tiles = 0
        """Of this epoch."""
        self.payload_bytes = 0
        """Of this epoch."""
        self._num_layers = num_layers
        self._num_tokens = num_tokens

    def begin(self) -> int:
        """Expect a new stream; tiles of older ones are void from here on. Returns its epoch."""
        self.epoch += 1
        self.num_tiles = self.payload_bytes = 0
        return self.epoch

    @property
    def is_whole(self) -> bool:
        """Every layer of every token has arrived."""
        return self.position.layer == self._num_layers

    @property
    def num_tokens_done(self) -> int:
        """Tokens arrived, averaged over layers."""
        layer, token = self.position
        return (layer * self._num_tokens + token) // self._num_layers

    def admit(self, arrival: Arrival) -> None:
        """Note a tile that is about to be stored.

        Raises:
            PeerUnavailable: it is not the tile that must come next; nothing is noted.
        """
        self._expect_ours("tile", arrival.transfer_id, arrival.epoch)
        self._expect(not self.is_whole, "tile after the last one")
        layer, token = self.position
        self._expect(
            (arrival.layer, arrival.first_token) == self.position,
            f"tile at layer {arrival.layer} token {arrival.first_token}, expected layer {layer} token {token}",
        )
        left = self._num_tokens - token
        self._expect(1 <= arrival.num_tokens <= left, f"tile of {arrival.num_tokens} tokens where {left} are left")
        self.position = self.position.after(arrival.num_tokens, self._num_tokens)
        self.num_tiles += 1
        self.payload_bytes += arrival.payload_bytes

    def complete(self, *, transfer_id: str, epoch: int, num_tiles: int, payload_bytes: int) -> None:
        """Note the sender's last word.

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

    def _expect_ours(self, what: str, transfer_id: str, epoch: int) -> None:
        self._expect(transfer_id == self.transfer_id, f"{what} of transfer {transfer_id!r}")
        self._expect(epoch == self.epoch, f"{what} of epoch {epoch}, this is {self.epoch}")

    def _expect(self, condition: bool, problem: str) -> None:
        if not condition:
            raise PeerUnavailable(f"the prefill node broke the KV stream's order: {problem}")
