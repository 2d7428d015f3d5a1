"""The decode node's end of a KV stream: verifies each tile and writes it into its pages."""

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress

import grpc

from colm.clock import Clock
from colm.errors import DeadlineExceeded, PeerUnavailable
from colm.events import Queued, SparseReport
from colm.kv_position import KvPosition
from colm.wire.call_end import hear_end
from colm.wire.channels import BlockingChannels
from colm.wire.kv_codec import require_codec
from colm.wire.messages import queued_from_pb, sparse_report_from_pb
from colm.wire.security import Security
from colm.wire.shared_memory import SharedReader
from colm.wire.status import rpc_errors
from colm.wire.tile_codec import decode_message, pull_kv_stub, require_intact, require_tile
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_requests import KvRequests
from decode_node.kv_store import KvStore
from decode_node.prefill_pool import PrefillLease
from decode_node.prefix_sender import PrefixSender
from decode_node.transfer_ledger import Arrival

logger = logging.getLogger(__name__)


class KvReceiver:
    """Runs one transfer in a thread of its own: a blocking reader moves three times what an event loop can.

    `queued`, `started_s`, `heard_s` and `next_token_id` may be read from any thread.

    Args:
        transfer: what to fetch.
        lease: of the prefill node.
        store: the pages.
        channels: to prefill nodes.
        security: what to show them.
        clock: of `started_s` and `heard_s`.
        host: `host_id()`, if payloads may come through shared memory.
    """

    def __init__(
        self,
        transfer: KvTransfer,
        lease: PrefillLease,
        store: KvStore,
        channels: BlockingChannels,
        security: Security,
        clock: Clock,
        host: str = "",
    ) -> None:
        self._transfer = transfer
        self._lease = lease
        self._store = store
        self._channels = channels
        self._security = security
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._cancelled = False
        self._clock = clock
        self.queued: Queued | None = None
        """What goes before this prompt at the prefill node, as it last said."""
        self.started_s: float | None = None
        """When `started` came, by the clock; None before."""
        self.heard_s: float | None = None
        """When the last message came, by the clock; None before the first."""
        self.sparse: SparseReport | None = None
        """What became of sparse attention, once the node has said it."""
        self.num_cached_tokens = 0
        """Prompt tokens that the node had kept from an earlier prompt, once it has said it."""
        self.tile_tokens: int | None = None
        """What the node's tiles are, once it has begun; 0 from one that cannot leave out a prefix."""
        self.next_token_id: int | None = None
        """What chain 1 says behind the prompt, once the node has said it."""
        self._ledger = transfer.ledger
        held = PrefixSender.of(transfer, store)
        self._requests = KvRequests(transfer, lease.lease_id, self._break_off, host, held)
        self._memory: SharedReader | None = None

    def run(self) -> None:
        """Receive everything; returns when the last tile lies in its pages.

        Raises:
            PeerUnavailable: the node broke off, is not reachable, or broke the protocol.
            FingerprintMismatch: the node serves something else, or writes it in another format.
        """
        peer = f"prefill node {self._lease.address}"
        with self._channels.use(self._lease.address) as channel:
            call = pull_kv_stub(channel)(iter(self._requests), metadata=self._security.metadata())
            hear_end(call)
            with self._lock:
                self._call = call
                if self._cancelled:
                    call.cancel()
            try:
                with rpc_errors(peer):
                    if not self._receive(call):
                        raise PeerUnavailable(f"{peer} ended the KV stream before it was complete")
            except DeadlineExceeded as err:  # not the request's: this call has none
                raise PeerUnavailable(f"{peer} waited for the prompt in vain") from err
            finally:
                self._requests.close()
                call.cancel()
                if self._memory is not None:
                    self._memory.close()

    def cancel(self) -> None:
        """Make `run` return soon; from any thread, at any time."""
        with self._lock:
            self._cancelled = True
        if not self._requests.give_up():
            self._break_off()

    def _break_off(self) -> None:
        with self._lock:
            if self._call is not None:
                self._call.cancel()

    def _receive(self, call: Iterator[bytes]) -> bool:
        for data in call:
            if self._cancelled:
                continue  # the node can end the call only after what is on its way has been read
            self.heard_s = self._clock.now()
            message, payload = decode_message(data)
            match message.WhichOneof("event"):
                case "queued":
                    self.queued = self._read_queued(message.queued)
                case "started":
                    # Unset by a node that knows raw alone.
                    codec = message.started.codec or common_pb2.CODEC_RAW
                    require_codec(codec, self._transfer.codec, f"the KV stream of {self._lease.address}")
                    self.tile_tokens = message.started.tile_tokens
                    self.started_s = self._clock.now()
                case "tile":
                    self._store_tile(message.tile, payload)
                case "shared_tiles":
                    for header in message.shared_tiles.tiles:
                        self._store_tile(header, payload)
                case "shared_memory":
                    self._requests.answer(is_mapped=self._open(message.shared_memory))
                case "prefix_wanted":
                    self._requests.want(message.prefix_wanted)
                case "provisional_token":
                    self._hear_next_token(message.provisional_token.token_id)
                case "reached":
                    self._ledger.reach(KvPosition(message.reached.layer, message.reached.token))
                case _:
                    self._ledger.complete(
                        transfer_id=message.complete.transfer_id,
                        epoch=message.complete.epoch,
                        num_tiles=message.complete.num_tiles,
                        payload_bytes=message.complete.payload_bytes,
                        shared_bytes=message.complete.shared_bytes,
                    )
                    if message.complete.HasField("sparse"):
                        self.sparse = sparse_report_from_pb(message.complete.sparse)
                    self.num_cached_tokens = message.complete.num_cached_tokens
                    self._requests.close()
                    self._see_off(call)
                    return True
        return False

    def _read_queued(self, message: common_pb2.Queued) -> Queued:
        try:
            return queued_from_pb(message)
        except ValueError as err:
            raise PeerUnavailable(f"the KV stream broke its format: {err}") from err

    def _hear_next_token(self, token_id: int) -> None:
        if self._transfer.last_token_id is None or self.next_token_id is not None:
            raise PeerUnavailable("the KV stream broke its format: a provisional token that was not asked for")
        self.next_token_id = token_id
        self._transfer.on_next_token()

    def _see_off(self, call: Iterator[bytes]) -> None:
        """Read until the node ends the call, so that the last acknowledgement reaches it; errors no longer matter."""
        with suppress(grpc.RpcError):
            for _ in call:
                pass

    def _open(self, place: pb.SharedMemory) -> bool:
        """Open the node's shared memory, if that can be done; payloads stay on the stream otherwise."""
        if self._memory is not None:
            raise PeerUnavailable("the KV stream broke its format: shared memory was offered twice")
        try:
            self._memory = SharedReader(place)
        except OSError as err:
            logger.info("transfer.not_mapped request=%s cause=%s", self._ledger.transfer_id, err)
            return False
        return True

    def _store_tile(self, header: pb.TileHeader, payload: memoryview) -> None:
        if not header.HasField("shared"):
            self._store_payload(header, payload, is_shared=False)
            return
        if self._memory is None or payload:
            raise PeerUnavailable("the KV stream broke its format: a payload where none was expected")
        with self._memory.payload(header.shared) as shared:
            self._store_payload(header, shared, is_shared=True)

    def _store_payload(self, header: pb.TileHeader, payload: memoryview, *, is_shared: bool) -> None:
        store, transfer = self._store, self._transfer
        require_tile(header, payload, store.layout.kv_format, transfer.codec)
        arrival = Arrival(
            transfer_id=header.transfer_id,
            epoch=header.epoch,
            layer=header.layer,
            first_token=header.first_token,
            num_tokens=header.num_tokens,
            payload_bytes=len(payload),
            is_shared=is_shared,
            effective_bytes=header.num_tokens * store.layout.layer_token_bytes,
        )
        # [0, position)   verified
        # [position, ..)  nobody reads; a payload that turns out to be damaged here is written over by the next stream
        self._ledger.require_next(arrival)
        place = KvPosition(header.layer, header.first_token)
        checksum = store.write_payload(
            transfer.table_M, place, header.num_tokens, payload, transfer.codec, is_shared=is_shared
        )
        require_intact(header, checksum)
        self._ledger.admit(arrival)
        self._requests.stored(self._ledger.position, len(payload), is_last=self._ledger.is_whole)
