"""KvTransferService: one prompt at a time through the engine, its tiles onto the caller's stream."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from colm.errors import CapacityExceeded, FingerprintMismatch, InvalidRequest
from colm.leases import LeaseTable
from colm.wire.prompt_stream import read_open, read_token_ids
from colm.wire.status import answering
from colm.wire.tile_codec import encode_tile, max_tile_tokens, pull_kv_handlers, split_tile
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from prefill_node.engine import PrefillEngine
from prefill_node.handoff import Handoff

logger = logging.getLogger(__name__)

# Enough to keep the wire busy while the next tile is computed, little enough to notice a slow reader.
_MESSAGES_IN_FLIGHT = 8
_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """How busy the node is."""

    num_active: int
    num_queued: int


class PrefillService:
    """Serves `PullKv`.

    Args:
        engine: computes the tiles; used by one stream at a time.
        fingerprint: `colm.kv.fingerprint` of what the engine serves.
        leases: where a stream must hold a lease, the table of them; None serves any caller.
        max_queued: streams that may wait for the engine; the next is refused.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        *,
        fingerprint: str,
        leases: LeaseTable | None = None,
        max_queued: int = 64,
    ) -> None:
        self._engine = engine
        self._fingerprint = fingerprint
        self._leases = leases
        self._max_queued = max_queued
        self._device = asyncio.Lock()
        self._waiting = 0

    @property
    def load(self) -> PrefillLoad:
        """Streams being computed, and waiting."""
        return PrefillLoad(num_active=int(self._device.locked()), num_queued=self._waiting)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        server.add_generic_rpc_handlers((pull_kv_handlers(self.pull_kv),))

    async def pull_kv(self, requests: AsyncIterator[pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        """One transfer; see the .proto file."""
        async with answering(context, "pull_kv"), AsyncExitStack() as stack:
            opened = await read_open(requests)
            if opened.fingerprint != self._fingerprint:
                raise FingerprintMismatch(
                    f"this prefill node serves {self._fingerprint[:16]}, the caller wants {opened.fingerprint[:16]}: "
                    "different chain 1, dtype or page size"
                )
            if self._leases is not None:
                stack.callback(self._leases.release, self._leases.open(opened.lease_id))
            limit = self._engine.config.max_context
            if not 1 <= opened.num_tokens <= limit:
                raise InvalidRequest("num_tokens", opened.num_tokens, f"must be between 1 and {limit}")
            token_ids = await read_token_ids(requests, opened.num_tokens)
            self._engine.check(token_ids)
            await stack.enter_async_context(self._turn())
            await self._stream(opened, token_ids, context)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._waiting >= self._max_queued:
            raise CapacityExceeded(f"{self._waiting} prompts wait for this prefill node already; try again later")
        self._waiting += 1
        try:
            await self._device.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._device.release()

    async def _stream(
        self, opened: pb.OpenKvTransfer, token_ids: NDArray[np.int64], context: grpc.aio.ServicerContext
    ) -> None:
        started_s = time.monotonic()
        handoff = Handoff(_MESSAGES_IN_FLIGHT)
        thread = handoff.start(lambda: self._messages(opened, token_ids, handoff))
        ended = "cancelled"
        try:
            async for message in handoff.items():
                await context.write(message)
            await thread
            ended = "complete"
        finally:
            # The engine belongs to the next stream only after this thread has let go of it.
            handoff.close()
            await asyncio.shield(asyncio.wait([thread]))
            logger.info(
                "transfer.%s request=%s epoch=%d tokens=%d dur_ms=%.1f",
                ended,
                opened.transfer_id,
                opened.epoch,
                opened.num_tokens,
                (time.monotonic() - started_s) * 1e3,
            )

    def _messages(self, opened: pb.OpenKvTransfer, token_ids: NDArray[np.int64], handoff: Handoff) -> Iterator[bytes]:
        max_tokens = max_tile_tokens(self._engine.layout, _MESSAGE_BYTES)
        num_tiles = payload_bytes = 0
        for computed in self._engine.run(token_ids):
            for tile in split_tile(computed, max_tokens):
                yield encode_tile(tile, transfer_id=opened.transfer_id, epoch=opened.epoch)
                num_tiles += 1
                payload_bytes += tile.num_tokens * self._engine.layout.layer_token_bytes
            if handoff.closed:
                return
        complete = pb.TransferComplete(
            transfer_id=opened.transfer_id,
            epoch=opened.epoch,
            num_tiles=num_tiles,
            payload_bytes=payload_bytes,
        )
        yield pb.PullKvResponse(complete=complete).SerializeToString()
