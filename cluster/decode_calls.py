"""The front door's calls to decode nodes: gRPC, over channels that all calls to a node share."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import numpy as np

from cluster.front_door.placement import DecodeJob, DecodeLease
from colm.clock import Deadline
from colm.errors import ColmError, PeerUnavailable
from colm.events import Event, Finished, Resumed
from colm.scale import Changing, Scale
from colm.wire.channels import Channels
from colm.wire.messages import (
    CODECS,
    attention_to_pb,
    end_of_prompt,
    event_from_pb,
    sampling_to_pb,
    scale_to_pb,
    token_id_pieces,
)
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub

logger = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S = 5.0


class GrpcDecodeCalls:
    """`DecodeNodeCalls` over gRPC. Lives on one event loop; `close` it.

    Args:
        security: token and TLS that the nodes demand.
    """

    def __init__(self, security: Security) -> None:
        self._security = security
        self._channels = Channels(security)
        self._cancelling: set[asyncio.Task[None]] = set()
        self._leaves_answers = False

    async def close(self) -> None:
        """Close the channels; every call must have ended."""
        await asyncio.gather(*self._cancelling)
        await self._channels.close()

    def leave_answers(self) -> None:
        """See `DecodeNodeCalls`."""
        self._leaves_answers = True

    async def decode(
        self, lease: DecodeLease, job: DecodeJob, *, only_if_room: bool, deadline: Deadline
    ) -> AsyncGenerator[Event]:
        """See `DecodeNodeCalls`."""
        opened = pb.OpenDecode(
            request_id=job.request_id,
            num_chains=job.scale.value.num_chains,
            min_chains=job.scale.value.min_chains,
            max_new_tokens=job.max_new_tokens,
            sampling=sampling_to_pb(job.sampling),
            num_prompt_tokens=len(job.token_ids),
            num_answer_tokens=len(job.made_token_ids),
            lease_id=lease.lease_id,
            only_if_room=only_if_room,
            attention=attention_to_pb(job.attention),
            kv_codec=CODECS[job.kv_codec],
            max_draft_tokens=job.max_draft_tokens,
            answer_key=job.answer_key,
            cache_salt=job.cache_salt,
            provisional_first_token=job.provisional_first_token,
        )

        async def requests(changes: AsyncIterator[Scale]) -> AsyncIterator[pb.DecodeRequest]:
            token_ids = np.append(job.token_ids, np.array(job.made_token_ids, dtype=np.int64))
            yield pb.DecodeRequest(open=opened)
            for piece in token_id_pieces(token_ids):
                yield pb.DecodeRequest(token_ids=piece)
            yield pb.DecodeRequest(end_of_prompt=end_of_prompt(token_ids))
            async for scale in changes:
                yield pb.DecodeRequest(change_scale=scale_to_pb(scale))

        with job.scale.followed() as changes:
            sent = requests(changes)
            async with aclosing(self._events(lease.address, sent, job.answer_key, job.request_id, deadline)) as events:
                async for event in events:
                    yield event

    async def resume(
        self, address: str, answer_key: str, num_tokens: int, *, scale: Changing[Scale | None], deadline: Deadline
    ) -> AsyncGenerator[Event]:
        """See `DecodeNodeCalls`."""

        async def requests(changes: AsyncIterator[Scale | None]) -> AsyncIterator[pb.DecodeRequest]:
            yield pb.DecodeRequest(resume=pb.ResumeDecode(answer_key=answer_key, num_tokens=num_tokens))
            if scale.value is not None:
                yield pb.DecodeRequest(change_scale=scale_to_pb(scale.value))
            async for changed in changes:
                assert changed is not None, "a scale is not taken back"
                yield pb.DecodeRequest(change_scale=scale_to_pb(changed))

        with scale.followed() as changes:
            sent = requests(changes)
            async with aclosing(self._events(address, sent, answer_key, None, deadline)) as events:
                async for event in events:
                    yield event

    async def _events(
        self,
        address: str,
        requests: AsyncIterator[pb.DecodeRequest],
        answer_key: str,
        request_id: str | None,
        deadline: Deadline,
    ) -> AsyncGenerator[Event]:
        is_over = False
        async with self._channels.use(address) as channel:
            call = DecodeServiceStub(channel).Decode(
                requests, metadata=self._security.metadata(), timeout=deadline.remaining_s()
            )
            try:
                with Outcome(call).errors(f"decode node {address}"):
                    async for message in call:
                        event = _event(message, address)
                        is_over = isinstance(event, Finished)
                        if isinstance(event, Resumed):
                            request_id = event.request_id
                        yield event
            except PeerUnavailable:
                raise
            except ColmError:
                is_over = True
                raise
            finally:
                call.cancel()
                if answer_key and request_id is not None and not is_over and not self._leaves_answers:
                    self._cancel(address, answer_key, request_id)

    def _cancel(self, address: str, answer_key: str, request_id: str) -> None:
        """Tell a node that nobody will ask for an answer: it cannot know that this gateway lives. Nobody waits."""
        cancelling = asyncio.create_task(self._say_cancel(address, answer_key, request_id))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def _say_cancel(self, address: str, answer_key: str, request_id: str) -> None:
        try:
            async with self._channels.use(address) as channel:
                call = DecodeServiceStub(channel).CancelDecode(
                    pb.CancelDecodeRequest(answer_key=answer_key, request_id=request_id),
                    metadata=self._security.metadata(),
                    timeout=_CANCEL_TIMEOUT_S,
                )
                with Outcome(call).errors(f"decode node {address}"):
                    await call
        except ColmError as err:  # then the node lets go by itself, after decode.orphan_s
            logger.info("decode.cancel_unheard address=%s cause=%s", address, err)


def _event(message: pb.DecodeResponse, address: str) -> Event:
    try:
        return event_from_pb(message)
    except ValueError as err:
        raise PeerUnavailable(f"decode node {address} broke the protocol: {err}") from err
