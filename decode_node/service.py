"""DecodeService, the gRPC adapter of the request owner: messages become jobs, events become messages."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc

from colm.clock import Clock, Deadline
from colm.errors import InvalidRequest
from colm.events import Event
from colm.leases import LeaseTable
from colm.model.config import ChainConfig
from colm.wire.messages import attention_from_pb, decode_response, sampling_from_pb
from colm.wire.prompt_stream import check_id, read_open, read_token_ids
from colm.wire.status import answering
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from decode_node.requests import DecodeJob, RequestOwner


class DecodeService(DecodeServiceServicer):
    """Serves `Decode`.

    Args:
        leases: the leases that calls must hold; None serves any caller.
    """

    def __init__(self, owner: RequestOwner, config: ChainConfig, clock: Clock, leases: LeaseTable | None) -> None:
        self._owner = owner
        self._config = config
        self._clock = clock
        self._leases = leases

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        add_DecodeServiceServicer_to_server(self, server)

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve one request; see the .proto file."""
        async with answering(context, "decode"), AsyncExitStack() as stack:
            opened = await read_open(request_iterator)
            check_id("request_id", opened.request_id)
            check_id("lease_id", opened.lease_id)
            if self._leases is not None:
                stack.callback(self._leases.release, self._leases.open(opened.lease_id))
            self._check(opened)
            num_prompt_tokens = opened.num_prompt_tokens
            token_ids = await read_token_ids(request_iterator, num_prompt_tokens + opened.num_answer_tokens)
            if (worst := int(token_ids.max())) >= self._config.vocab_size:
                raise InvalidRequest("token_ids", worst, f"must be below the vocabulary size {self._config.vocab_size}")
            remaining_s = context.time_remaining()
            job = DecodeJob(
                request_id=opened.request_id,
                token_ids=token_ids[:num_prompt_tokens],
                made_token_ids=tuple(token_ids[num_prompt_tokens:].tolist()),
                num_chains=opened.num_chains,
                max_new_tokens=opened.max_new_tokens,
                sampling=sampling_from_pb(opened.sampling),
                deadline=None if remaining_s is None else Deadline.after(self._clock, remaining_s),
                only_if_room=opened.only_if_room,
                attention=attention_from_pb(opened.attention),
            )

            async def emit(event: Event) -> None:
                await context.write(decode_response(event))

            await self._owner.run(job, emit)

    def _check(self, opened: pb.OpenDecode) -> None:
        config = self._config
        if not 1 <= opened.num_chains <= config.num_chains:
            raise InvalidRequest("num_chains", opened.num_chains, f"must be between 1 and {config.num_chains}")
        if opened.num_prompt_tokens < 1:
            raise InvalidRequest("num_prompt_tokens", opened.num_prompt_tokens, "must be at least 1")
        if opened.max_new_tokens < 1:
            raise InvalidRequest("max_new_tokens", opened.max_new_tokens, "must be at least 1")
        if opened.num_answer_tokens > opened.max_new_tokens:
            limit = f"must be at most max_new_tokens={opened.max_new_tokens}"
            raise InvalidRequest("num_answer_tokens", opened.num_answer_tokens, limit)
        total = opened.num_prompt_tokens + opened.max_new_tokens
        if total > config.max_context:
            raise InvalidRequest(
                "num_prompt_tokens",
                opened.num_prompt_tokens,
                f"with max_new_tokens={opened.max_new_tokens} must fit the model's context of {config.max_context}",
            )
