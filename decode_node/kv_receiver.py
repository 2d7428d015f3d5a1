"""The decode node's end of a KV stream: verifies each tile and writes it into its pages."""

import threading
from collections.abc import Iterator
from contextlib import suppress

import grpc

from colm.clock import Clock
from colm.errors import DeadlineExceeded, PeerUnavailable
from colm.events import Queued, SparseReport
from colm.kv_position import KvPosition
from colm.wire.channels import BlockingChannels
from colm.wire.messages import queued_from_pb, sparse_report_from_pb
from colm.wire.security import Security
from colm.wire.status import rpc_errors
from colm.wire.tile_codec import decode_message, decode_tile, pull_kv_stub
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_requests import KvRequests
from decode_node.kv_store import KvStore
from decode_node.prefill_pool import PrefillLease
from decode_node.transfer_ledger import Arrival


class KvReceiver:
    """Runs one transfer in a thread of its own: a blocking reader moves three times what an event loop can.

    `num_ahead`, `started_s` and `heard_s` may be read from any thread.
    """

    def __init__(
        self,
        transfer: KvTransfer,
        lease: PrefillLease,
        store: KvStore,
        channels: BlockingChannels,
        security: Security,
        clock: Clock,
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
        self._ledger = transfer.ledger
        self._requests = KvRequests(transfer, lease.lease_id, self._break_off)

    def run(self) -> None:
        """Receive everything; returns when the last tile lies in its pages.

        Raises:
            PeerUnavailable: the node broke off, is not reachable, or broke the protocol.
            FingerprintMismatch: the node serves something else, or writes it in another format.
        """
        peer = f"prefill node {self._lease.address}"
        with self._channels.use(self._lease.address) as channel:
            call = pull_kv_stub(channel)(iter(self._requests), metadata=self._security.metadata())
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
                    self.started_s = self._clock.now()
                case "tile":
                    self._store_tile(message.tile, payload)
                case "reached":
                    self._ledger.reach(KvPosition(message.reached.layer, message.reached.token))
                case _:
                    self._ledger.complete(
                        transfer_id=message.complete.transfer_id,
                        epoch=message.complete.epoch,
                        num_tiles=message.complete.num_tiles,
                        payload_bytes=message.complete.payload_bytes,
                    )
                    if message.complete.HasField("sparse"):
                        self.sparse = sparse_report_from_pb(message.complete.sparse)
                    self._requests.close()
                    self._see_off(call)
                    return True
        return False

    def _read_queued(self, message: common_pb2.Queued) -> Queued:
        try:
            return queued_from_pb(message)
        except ValueError as err:
            raise PeerUnavailable(f"the KV stream broke its format: {err}") from err

    def _see_off(self, call: Iterator[bytes]) -> None:
        """Read until the node ends the call, so that the last acknowledgement reaches it; errors no longer matter."""
        with suppress(grpc.RpcError):
            for _ in call:
                pass

    def _store_tile(self, header: pb.TileHeader, payload: memoryview) -> None:
        tile = decode_tile(header, payload, self._store.layout.kv_format)
        self._ledger.admit(
            Arrival(
                transfer_id=header.transfer_id,
                epoch=header.epoch,
                layer=tile.layer,
                first_token=tile.first_token,
                num_tokens=tile.num_tokens,
                payload_bytes=len(payload),
            )
        )
        self._store.write(self._transfer.table_M, tile)
        self._requests.stored(self._ledger.position, len(payload), is_last=self._ledger.is_whole)
