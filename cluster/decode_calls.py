"""The front door's calls to decode nodes: gRPC, over channels that all calls to a node share."""

from collections.abc import AsyncGenerator, AsyncIterator

import numpy as np

from cluster.front_door.placement import DecodeJob, DecodeLease
from colm.clock import Deadline
from colm.errors import PeerUnavailable
from colm.events import Event
from colm.wire.channels import Channels
from colm.wire.messages import attention_to_pb, event_from_pb, sampling_to_pb, token_id_pieces
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import common_pb2
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub


class GrpcDecodeCalls:
    """`DecodeNodeCalls` over gRPC. Lives on one event loop; `close` it.

    Args:
        security: token and TLS that the nodes demand.
    """

    def __init__(self, security: Security) -> None:
        self._security = security
        self._channels = Channels(security)

    async def close(self) -> None:
        """Close the channels; every call must have ended."""
        await self._channels.close()

    async def decode(
        self, lease: DecodeLease, job: DecodeJob, *, only_if_room: bool, deadline: Deadline
    ) -> AsyncGenerator[Event]:
        """See `DecodeNodeCalls`."""
        opened = pb.OpenDecode(
            request_id=job.request_id,
            num_chains=job.num_chains,
            max_new_tokens=job.max_new_tokens,
            sampling=sampling_to_pb(job.sampling),
            num_prompt_tokens=len(job.token_ids),
            num_answer_tokens=len(job.made_token_ids),
            lease_id=lease.lease_id,
            only_if_room=only_if_room,
            attention=attention_to_pb(job.attention),
        )

        async def requests() -> AsyncIterator[pb.DecodeRequest]:
            yield pb.DecodeRequest(open=opened)
            for piece in token_id_pieces(np.append(job.token_ids, np.array(job.made_token_ids, dtype=np.int64))):
                yield pb.DecodeRequest(token_ids=piece)
            yield pb.DecodeRequest(end_of_prompt=common_pb2.EndOfPrompt())

        async with self._channels.use(lease.address) as channel:
            call = DecodeServiceStub(channel).Decode(
                requests(), metadata=self._security.metadata(), timeout=deadline.remaining_s()
            )
            try:
                with Outcome(call).errors(f"decode node {lease.address}"):
                    async for message in call:
                        yield _event(message, lease)
            finally:
                call.cancel()


def _event(message: pb.DecodeResponse, lease: DecodeLease) -> Event:
    try:
        return event_from_pb(message)
    except ValueError as err:
        raise PeerUnavailable(f"decode node {lease.address} broke the protocol: {err}") from err
