"""The messages of a decode node on a KV stream: `open`, the prompt, then acknowledgements or `give_up`.

Where the prefill node asks for keys and values of the prompt's beginning, they go up before the first acknowledgement.
"""

import logging
import threading
from collections.abc import Callable, Iterator

from colm.errors import NotFinite, PeerUnavailable
from colm.kv_position import KvPosition
from colm.wire.endpoint import KEEPALIVE
from colm.wire.messages import CODECS, attention_to_pb, end_of_prompt, token_id_pieces
from colm.wire.tile_codec import ACKNOWLEDGE_BYTES, encode_tile
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_fetch import KvTransfer
from decode_node.prefix_sender import PrefixSender

logger = logging.getLogger(__name__)

_GIVE_UP_S = KEEPALIVE.timeout_ms / 1e3
"""How long a node that lives may take to end a stream that is given up: as long as to answer a ping."""


class KvRequests:
    """Iterates over the requests of one stream; gRPC's thread reads them, the receiving thread steers them.

    Only the newest position waits to be sent, so one slot is enough.

    Args:
        transfer: what the stream shall bring.
        lease_id: the prefill node's lease for the stream.
        on_silence: called if the node does not end the stream within `_GIVE_UP_S` of `give_up`.
        host: `host_id()`, if payloads may come through shared memory.
        held: sends what lies before the transfer's first token; None where that cannot be sent.
    """

    def __init__(
        self,
        transfer: KvTransfer,
        lease_id: str,
        on_silence: Callable[[], None],
        host: str = "",
        held: PrefixSender | None = None,
    ) -> None:
        self._transfer = transfer
        self._held = held
        self._lease_id = lease_id
        self._host = host
        self._on_silence = on_silence
        self._changed = threading.Condition()
        self._stored = self._said = transfer.ledger.position
        self._unsaid_bytes = 0
        self._is_sent = False
        self._is_given_up = False
        self._is_closed = False
        self._is_mapped: bool | None = None

    def answer(self, *, is_mapped: bool) -> None:
        """Say whether the node's shared memory could be opened."""
        with self._changed:
            self._is_mapped = is_mapped
            self._changed.notify()

    def want(self, wanted: pb.PrefixWanted) -> None:
        """Send what the node asks for of the prompt's beginning.

        Raises:
            PeerUnavailable: it was not offered.
        """
        if self._held is None:
            raise PeerUnavailable("the KV stream broke its format: a beginning was asked for that nobody offered")
        with self._changed:
            self._held.want(wanted.first_token, wanted.end_token, wanted.refusal)
            self._changed.notify()

    def stored(self, position: KvPosition, num_bytes: int, *, is_last: bool) -> None:
        """Note more stored bytes, up to a position; acknowledged every `ACKNOWLEDGE_BYTES` and at the last tile."""
        self._unsaid_bytes += num_bytes
        if self._unsaid_bytes >= ACKNOWLEDGE_BYTES or is_last:
            self._unsaid_bytes = 0
            with self._changed:
                self._stored = position
                self._changed.notify()

    def give_up(self) -> bool:
        """Tell the node that nobody wants its work any more.

        Returns:
            False if nothing is told: the prompt's end has not been sent, and will not be, or the stream has ended.
        """
        with self._changed:
            if self._is_closed:
                return False
            self._is_given_up = True
            self._changed.notify()
            return self._is_sent

    def close(self) -> None:
        """Send nothing more, since the stream has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[pb.PullKvRequest]:
        transfer, ledger = self._transfer, self._transfer.ledger
        yield pb.PullKvRequest(
            open=pb.OpenKvTransfer(
                transfer_id=ledger.transfer_id,
                epoch=ledger.epoch,
                fingerprint=transfer.fingerprint,
                num_tokens=len(transfer.token_ids),
                lease_id=self._lease_id,
                resume_from=_position(self._said),
                codecs=[CODECS[transfer.codec]],
                attention=attention_to_pb(transfer.attention),
                host_id=self._host,
                first_token=ledger.first_token,
                cache_salt=transfer.cache_salt,
                held_tile_tokens=0 if self._held is None else transfer.held_tile_tokens,
                last_token_id=transfer.last_token_id,
            )
        )
        for piece in token_id_pieces(transfer.token_ids):
            yield pb.PullKvRequest(token_ids=piece)
        # From its last message on, the node may begin: then whoever breaks off without a word leaves it a job to keep.
        with self._changed:
            if self._is_given_up:
                self._changed.wait_for(lambda: self._is_closed, _GIVE_UP_S)  # the call is being broken off
                return
            self._is_sent = True
        yield pb.PullKvRequest(end_of_prompt=end_of_prompt(transfer.token_ids))
        while (request := self._next()) is not None:
            yield request
        if self._is_given_up:
            yield pb.PullKvRequest(give_up=pb.GiveUp())
            with self._changed:
                if not self._changed.wait_for(lambda: self._is_closed, _GIVE_UP_S):
                    self._on_silence()

    def _piece(self, held: PrefixSender) -> pb.PullKvRequest:
        """The next piece of the prompt's beginning, or that no more of it can be sent."""
        ledger = self._transfer.ledger
        try:
            message = encode_tile(held.take(), transfer_id=ledger.transfer_id, epoch=ledger.epoch)
        except NotFinite as damage:
            logger.warning("prefix.withdrawn request=%s cause=%s", ledger.transfer_id, damage)
            held.stop()
            return pb.PullKvRequest(held_end=pb.HeldEnd())
        # A response with a tile has the same bytes.
        return pb.PullKvRequest(held_tile=pb.HeldTile.FromString(message))

    @property
    def _sends_held(self) -> bool:
        return self._held is not None and self._held.is_due and not self._is_closed

    def _next(self) -> pb.PullKvRequest | None:
        """Wait for the next thing to say; None once the stream is given up or closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stored != self._said
                    or self._is_mapped is not None
                    or self._is_given_up
                    or self._is_closed
                    or self._sends_held
                )
            )
            if self._is_given_up:
                return None
            if (is_mapped := self._is_mapped) is not None:
                self._is_mapped = None
                return pb.PullKvRequest(shared_memory=pb.SharedMemoryAnswer(is_mapped=is_mapped, takes_several=True))
            # Inside the lock: the pages may be another's once the stream is closed.
            if self._held is not None and self._sends_held:
                return self._piece(self._held)
            if self._stored == self._said:
                return None
            self._said = self._stored
            return pb.PullKvRequest(acknowledged=_position(self._said))


def _position(position: KvPosition) -> pb.KvPosition:
    return pb.KvPosition(layer=position.layer, token=position.token)
