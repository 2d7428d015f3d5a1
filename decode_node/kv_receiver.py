"""The decode node's end of a KV stream: verify each tile, put it into its pages."""

import threading
from collections.abc import Iterator

import grpc

from colm.clock import Clock
from colm.errors import PeerUnavailable
from colm.wire.channels import BlockingChannels
from colm.wire.messages import token_id_pieces
from colm.wire.security import Security
from colm.wire.status import rpc_errors
from colm.wire.tile_codec import decode_message, decode_tile, pull_kv_stub
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_store import KvStore
from decode_node.prefill_pool import PrefillLease
from decode_node.transfer_ledger import Arrival, TransferLedger


class KvReceiver:
    """Runs one transfer in a thread of its own: a blocking reader moves three times what an event loop can.

    What it has come to may be read from any thread.
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
        self.num_ahead: int | None = None
        """Prompts before this one at the prefill node, as it last said."""
        self.started_s: float | None = None
        """When the computation began."""
        self._ledger = TransferLedger(
            transfer_id=transfer.transfer_id,
            epoch=transfer.epoch,
            num_layers=store.layout.kv_format.num_layers,
            num_tokens=len(transfer.token_ids),
        )

    @property
    def num_tokens_done(self) -> int:
        """Tokens arrived, averaged over layers."""
        return self._ledger.num_tokens_done

    @property
    def payload_bytes(self) -> int:
        """Keys and values arrived."""
        return self._ledger.payload_bytes

    def run(self) -> None:
        """Receive everything; returns when the last tile lies in its pages.

        Raises:
            PeerUnavailable: the node broke off, is not reachable, or broke the protocol.
            FingerprintMismatch: the node serves something else, or writes it in another format.
        """
        peer = f"prefill node {self._lease.address}"
        with self._channels.use(self._lease.address) as channel:
            call = pull_kv_stub(channel)(self._requests(), metadata=self._security.metadata())
            with self._lock:
                self._call = call
                if self._cancelled:
                    call.cancel()
            try:
                with rpc_errors(peer):
                    if not self._receive(call):
                        raise PeerUnavailable(f"{peer} ended the KV stream before it was complete")
            finally:
                call.cancel()

    def cancel(self) -> None:
        """Make `run` return soon; from any thread, at any time."""
        with self._lock:
            self._cancelled = True
            if self._call is not None:
                self._call.cancel()

    def _receive(self, call: Iterator[bytes]) -> bool:
        for data in call:
            message, payload = decode_message(data)
            match message.WhichOneof("event"):
                case "queued":
                    self.num_ahead = message.queued.num_ahead
                case "started":
                    self.started_s = self._clock.now()
                case "tile":
                    self._store_tile(message.tile, payload)
                case _:
                    self._ledger.complete(
                        transfer_id=message.complete.transfer_id,
                        epoch=message.complete.epoch,
                        num_tiles=message.complete.num_tiles,
                        payload_bytes=message.complete.payload_bytes,
                    )
                    return True
        return False

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

    def _requests(self) -> Iterator[pb.PullKvRequest]:
        transfer = self._transfer
        yield pb.PullKvRequest(
            open=pb.OpenKvTransfer(
                transfer_id=transfer.transfer_id,
                epoch=transfer.epoch,
                fingerprint=transfer.fingerprint,
                num_tokens=len(transfer.token_ids),
                lease_id=self._lease.lease_id,
            )
        )
        for piece in token_id_pieces(transfer.token_ids):
            yield pb.PullKvRequest(token_ids=piece)
        yield pb.PullKvRequest(end_of_prompt=common_pb2.EndOfPrompt())
