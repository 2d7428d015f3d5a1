"""KvTransferService: a prompt goes through the engine, its tiles onto the caller's stream."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import numpy as np
from numpy.typing import NDArray

from colm import tracing
from colm.errors import ColmError, FingerprintMismatch, InvalidRequest
from colm.events import Queued, WaitsFor
from colm.kv_position import KV_START, KvPosition
from colm.leases import LeaseTable
from colm.metrics.kv_stream import KvStreamMetrics, StreamCount
from colm.request import KvCodec
from colm.wire.kv_codec import choose_codec
from colm.wire.messages import CODECS, attention_from_pb, queued_to_pb, sparse_report_to_pb
from colm.wire.prompt_stream import check_id, check_salt, read_open, read_token_ids
from colm.wire.shared_memory import host_id
from colm.wire.status import answering
from colm.wire.tile_codec import decode_tile, encode_event, join_shared, pull_kv_handlers
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from prefill_node.engine import PrefillEngine
from prefill_node.job_policy import Wait
from prefill_node.job_stream import JobStream
from prefill_node.prefill_job import PrefillOrder
from prefill_node.prefill_load import PrefillLoad
from prefill_node.prefill_loop import PrefillLoop
from prefill_node.prefix_uplink import PrefixUplink
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import AuditPolicy
from prefill_node.sparse.prompt_plans import PromptPlans

logger = logging.getLogger(__name__)


_WORTH_SHARING_BYTES = 4 << 20
"""A shorter transfer is over about as soon as its reader has opened the memory."""


class _GivenUp(Exception):
    """The caller wants no more."""


class PrefillService:
    """Serves `PullKv`.

    Args:
        engine: says which prompts it can read.
        loop: runs the engine.
        fingerprint: `colm.kv.fingerprint` of what the engine serves.
        planner: of sparse attention, for those who ask for it.
        audit: what its plans must recall.
        metrics: counts the streams.
        leases: where a stream must hold a lease, the table of them; None serves any caller.
        shares_memory: offer shared memory to callers on this host.
        takes_prefixes: take keys and values of prompts' beginnings from callers: where each has shown a decode node's
            certificate.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        loop: PrefillLoop,
        *,
        fingerprint: str,
        planner: SparsePlanner,
        metrics: KvStreamMetrics,
        audit: AuditPolicy | None = None,
        leases: LeaseTable | None = None,
        shares_memory: bool = False,
        takes_prefixes: bool = False,
    ) -> None:
        self.takes_prefixes = takes_prefixes
        self._engine = engine
        self._loop = loop
        self._fingerprint = fingerprint
        self._planner = planner
        self._metrics = metrics
        self._audit = audit
        self._leases = leases
        self._host_id = host_id() if shares_memory else ""

    @property
    def load(self) -> PrefillLoad:
        """Streams being computed, and waiting."""
        return self._loop.load

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        server.add_generic_rpc_handlers((pull_kv_handlers(self.pull_kv),))

    async def pull_kv(self, requests: AsyncIterator[pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        """One transfer; see the .proto file."""
        async with answering(context, "pull_kv"), AsyncExitStack() as stack:
            note = stack.enter_context(tracing.span("prefill"))
            opened = await read_open(requests)
            note(transfer=opened.transfer_id, tokens=opened.num_tokens)
            for field in ("transfer_id", "fingerprint", "lease_id"):
                check_id(field, getattr(opened, field))
            if opened.fingerprint != self._fingerprint:
                raise FingerprintMismatch(
                    f"this prefill node serves {self._fingerprint[:16]}, the caller wants {opened.fingerprint[:16]}: "
                    "different chain 1 or dtype"
                )
            codec = choose_codec(opened.codecs)
            if self._leases is not None:
                stack.callback(self._leases.release, self._leases.open(opened.lease_id))
            limit = self._engine.config.max_context
            if not 1 <= opened.num_tokens <= limit:
                raise InvalidRequest("num_tokens", opened.num_tokens, f"must be between 1 and {limit}")
            self._check_start(opened)
            self._check_last_token(opened)
            reads_last_token = opened.HasField("last_token_id")
            self._loop.check(opened.num_tokens, self._plans(opened), reads_last_token=reads_last_token)
            token_ids = await read_token_ids(requests, opened.num_tokens)
            self._engine.check(token_ids)
            order = self._order(opened, token_ids, codec)
            stream = self._loop.attach(order)
            stack.callback(self._loop.detach, stream)
            count = stack.enter_context(self._metrics.stream(is_resumed=order.resume_from > KV_START))
            listening = asyncio.create_task(self._listen(requests, stream))
            stack.callback(listening.cancel)
            listening.add_done_callback(lambda done: None if done.cancelled() else stream.end(done.exception()))
            try:
                async with asyncio.timeout(None) as sending:
                    # A caller that reads nothing holds a write up for ever.
                    stream.break_off = lambda: sending.reschedule(asyncio.get_running_loop().time())
                    await self._send(opened, stream, count, context)
                    note(tiles=count.num_tiles, kv_bytes=count.payload_bytes)
            except _GivenUp:
                count.outcome = "given_up"
            except TimeoutError:
                stream.require_current()
                raise

    def _order(self, opened: pb.OpenKvTransfer, token_ids: NDArray[np.int64], codec: KvCodec) -> PrefillOrder:
        position = KvPosition(opened.resume_from.layer, opened.resume_from.token)
        end = KvPosition(self._engine.kv_format.num_layers, 0)
        if position.token >= opened.num_tokens or position > end:
            raise InvalidRequest("resume_from", position, f"must lie within {opened.num_tokens} tokens before {end}")
        return PrefillOrder(
            transfer_id=opened.transfer_id,
            epoch=opened.epoch,
            token_ids=token_ids,
            resume_from=position,
            sparse=self._plans(opened),
            codec=codec,
            first_token=opened.first_token,
            cache_salt=opened.cache_salt,
            held_tokens=opened.first_token if self._takes_prefix(opened) else 0,
            last_token_id=opened.last_token_id if opened.HasField("last_token_id") else None,
        )

    def _takes_prefix(self, opened: pb.OpenKvTransfer) -> bool:
        """Whether what the caller holds has the bits that this node would compute."""
        return self.takes_prefixes and opened.held_tile_tokens == self._engine.tile_tokens

    def _check_start(self, opened: pb.OpenKvTransfer) -> None:
        """Refuse a prefix that this node cannot leave out, and a salt that is too long."""
        first_token, tile_tokens = opened.first_token, self._engine.tile_tokens
        if first_token >= opened.num_tokens or first_token % tile_tokens:
            # Tiles cut elsewhere would differ by rounding from those of a stream that brings everything.
            limit = (
                f"must be a multiple of {tile_tokens}, this node's tile_tokens, below num_tokens={opened.num_tokens}"
            )
            raise InvalidRequest("first_token", first_token, limit)
        if first_token and attention_from_pb(opened.attention) == "sparse":
            limit = "must be 0 with sparse attention, whose plans depend on the whole prompt"
            raise InvalidRequest("first_token", first_token, limit)
        check_salt(opened.cache_salt)

    def _check_last_token(self, opened: pb.OpenKvTransfer) -> None:
        if not opened.HasField("last_token_id"):
            return
        config, token_id = self._engine.config, opened.last_token_id
        if token_id >= config.vocab_size:
            raise InvalidRequest("last_token_id", token_id, f"must be below the vocabulary size {config.vocab_size}")
        if opened.num_tokens == config.max_context:
            limit = f"has no place behind num_tokens={opened.num_tokens}, the model's context"
            raise InvalidRequest("last_token_id", token_id, limit)

    def _plans(self, opened: pb.OpenKvTransfer) -> PromptPlans | None:
        is_sparse = attention_from_pb(opened.attention) == "sparse"
        return PromptPlans(self._planner, self._audit) if is_sparse else None

    async def _listen(self, requests: AsyncIterator[pb.PullKvRequest], stream: JobStream) -> None:
        """What the caller says once its prompt is here."""
        async for request in requests:
            match request.WhichOneof("part"):
                case "acknowledged":
                    stream.acknowledge(KvPosition(request.acknowledged.layer, request.acknowledged.token))
                case "shared_memory":
                    answer = request.shared_memory
                    stream.answer(is_mapped=answer.is_mapped, takes_several=answer.takes_several)
                case "held_tile" if stream.uplink is not None:
                    self._take_held(stream.uplink, request.held_tile)
                case "held_end" if stream.uplink is not None:
                    stream.uplink.withdraw()
                case "give_up":
                    self._loop.give_up(stream)
                    raise _GivenUp
                case part:
                    raise InvalidRequest("part", part, "must not follow `end_of_prompt`, or nobody asked for it")

    def _take_held(self, uplink: PrefixUplink, held: pb.HeldTile) -> None:
        try:
            tile = decode_tile(held.tile, memoryview(held.payload), self._engine.kv_format)
        except ColmError as damage:  # a fault of the caller's, for which its prompt is computed instead
            uplink.refuse(str(damage))
        else:
            uplink.take(tile, transfer_id=held.tile.transfer_id, epoch=held.tile.epoch)

    async def _send(
        self, opened: pb.OpenKvTransfer, stream: JobStream, count: StreamCount, context: grpc.aio.ServicerContext
    ) -> None:
        async def ask_for_prefix() -> None:
            if stream.uplink is not None and (wanted := stream.uplink.take_word()) is not None:
                word = pb.PrefixWanted(
                    first_token=wanted.first_token, end_token=wanted.end_token, refusal=wanted.refusal
                )
                await context.write(encode_event(pb.PullKvResponse(prefix_wanted=word)))

        async def beat(wait: Wait) -> None:
            await ask_for_prefix()
            queued = Queued(
                waits_for=WaitsFor.PREFILL_NODE, num_ahead=wait.num_ahead, estimated_wait_s=wait.estimated_s
            )
            await context.write(encode_event(pb.PullKvResponse(queued=queued_to_pb(queued))))

        async def progress(reached: KvPosition) -> None:
            position = pb.KvPosition(layer=reached.layer, token=reached.token)
            await context.write(encode_event(pb.PullKvResponse(reached=position)))

        async def say_next_token() -> None:
            if (token_id := stream.take_next_token()) is not None:
                said = common_pb2.ProvisionalToken(token_id=token_id)
                await context.write(encode_event(pb.PullKvResponse(provisional_token=said)))

        started = pb.TransferStarted(codec=CODECS[stream.job.encoder.codec], tile_tokens=self._engine.tile_tokens)
        started_s, ended = time.monotonic(), "cancelled"
        try:
            with tracing.span("wait_for_engine"):
                await self._loop.turn(stream, beat)
                await ask_for_prefix()
            started_s = time.monotonic()
            await context.write(encode_event(pb.PullKvResponse(started=started)))
            if self._host_id and opened.host_id == self._host_id:
                await self._offer_memory(stream, context)
            async for tile in stream.tiles(progress):
                # Before the tiles that were made with it: it is a few bytes, and a word that somebody waits for.
                await say_next_token()
                tiles = [tile] if tile.slot is None else [tile, *stream.take_shared()]
                await context.write(tile.message if len(tiles) == 1 else join_shared([each.message for each in tiles]))
                count.num_tiles += len(tiles)
                payload_bytes = sum(each.payload_bytes for each in tiles)
                count.payload_bytes += payload_bytes
                count.shared_bytes += 0 if tile.slot is None else payload_bytes
            complete = pb.TransferComplete(
                transfer_id=opened.transfer_id,
                epoch=opened.epoch,
                num_tiles=count.num_tiles,
                payload_bytes=count.payload_bytes,
                shared_bytes=count.shared_bytes,
                num_computed_tokens=stream.job.num_computed_tokens,
                num_cached_tokens=stream.job.num_cached_tokens if stream.job.is_started else 0,
            )
            if (report := stream.job.sparse_report) is not None:
                complete.sparse.CopyFrom(sparse_report_to_pb(report))
            await context.write(encode_event(pb.PullKvResponse(complete=complete)))
            await stream.until_stored()
            ended = "complete"
        finally:
            logger.info(
                "transfer.%s request=%s epoch=%d tokens=%d bytes=%d shared_bytes=%d dur_ms=%.1f",
                ended,
                opened.transfer_id,
                opened.epoch,
                opened.num_tokens,
                count.payload_bytes,
                count.shared_bytes,
                (time.monotonic() - started_s) * 1e3,
            )

    async def _offer_memory(self, stream: JobStream, context: grpc.aio.ServicerContext) -> None:
        """Ask the caller to open the job's memory; payloads stay on the stream until it has."""
        if len(stream.job.token_ids) * self._engine.kv_format.token_bytes < _WORTH_SHARING_BYTES:
            return
        try:
            place = stream.share().place()
        except OSError as err:
            logger.info("transfer.not_shared request=%s cause=%s", stream.job.transfer_id, err)
        else:
            await context.write(encode_event(pb.PullKvResponse(shared_memory=place)))
