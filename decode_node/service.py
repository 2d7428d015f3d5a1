"""DecodeService, the gRPC adapter of the held answers: messages become jobs, events become messages."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc

from colm.beside import beside
from colm.clock import Clock, Deadline
from colm.errors import InvalidRequest
from colm.events import Resumed
from colm.leases import LeaseTable
from colm.model.config import ChainConfig
from colm.scale import Changing, Scale, ScaleWish
from colm.wire.messages import attention_from_pb, decode_response, kv_codec_from_pb, sampling_from_pb
from colm.wire.prompt_stream import check_id, check_salt, read_changes, read_first, read_token_ids
from colm.wire.status import answering
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from decode_node.held_answers import HeldAnswers
from decode_node.requests import DecodeJob


class DecodeService(DecodeServiceServicer):
    """Serves `Decode` and `CancelDecode`.

    Args:
        answers: runs requests.
        config: of the model.
        clock: of the requests' deadlines.
        leases: the leases that calls must hold; None serves any caller.
    """

    def __init__(self, answers: HeldAnswers, config: ChainConfig, clock: Clock, leases: LeaseTable | None) -> None:
        self._answers = answers
        self._config = config
        self._clock = clock
        self._leases = leases

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        add_DecodeServiceServicer_to_server(self, server)

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve one request, or go on with one; see the .proto file."""
        async with answering(context, "decode"), AsyncExitStack() as stack:
            first = await read_first(request_iterator, "resume")
            if first.WhichOneof("part") == "resume":
                key = check_id("answer_key", first.resume.answer_key)
                job, events = await stack.enter_async_context(self._answers.resume(key, first.resume.num_tokens))
                await context.write(decode_response(_resumed(job)))
            else:
                opened = first.open
                check_id("request_id", opened.request_id)
                check_id("lease_id", opened.lease_id)
                check_id("answer_key", opened.answer_key)
                if self._leases is not None:
                    stack.callback(self._leases.release, self._leases.open(opened.lease_id))
                job = await self._read(opened, request_iterator, context.time_remaining())
                events = await stack.enter_async_context(self._answers.begin(job, opened.answer_key))
            async with beside(self._change(job, request_iterator)):
                async for event in events:
                    await context.write(decode_response(event))

    async def CancelDecode(
        self, request: pb.CancelDecodeRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelDecodeResponse:
        """End a request; see the .proto file."""
        async with answering(context, "cancel"):
            self._answers.cancel(check_id("answer_key", request.answer_key), request.request_id)
            return pb.CancelDecodeResponse()
        raise AssertionError("answering ends the call")

    async def _change(self, job: DecodeJob, requests: AsyncIterator[pb.DecodeRequest]) -> None:
        async for wish in read_changes(requests):
            job.scale.change(Scale.of(wish, self._config.num_chains))

    async def _read(
        self, opened: pb.OpenDecode, requests: AsyncIterator[pb.DecodeRequest], remaining_s: float | None
    ) -> DecodeJob:
        scale = self._check(opened)
        num_prompt_tokens = opened.num_prompt_tokens
        token_ids = await read_token_ids(requests, num_prompt_tokens + opened.num_answer_tokens)
        if (worst := int(token_ids.max())) >= self._config.vocab_size:
            raise InvalidRequest("token_ids", worst, f"must be below the vocabulary size {self._config.vocab_size}")
        sampling = sampling_from_pb(opened.sampling)
        sampling.check_vocabulary(self._config.vocab_size)
        return DecodeJob(
            request_id=opened.request_id,
            token_ids=token_ids[:num_prompt_tokens],
            scale=Changing(scale),
            max_new_tokens=opened.max_new_tokens,
            sampling=sampling,
            deadline=None if remaining_s is None else Deadline.after(self._clock, remaining_s),
            only_if_room=opened.only_if_room,
            attention=attention_from_pb(opened.attention),
            kv_codec=kv_codec_from_pb(opened.kv_codec),
            max_draft_tokens=opened.max_draft_tokens if opened.HasField("max_draft_tokens") else None,
            made_token_ids=tuple(token_ids[num_prompt_tokens:].tolist()),
            cache_salt=check_salt(opened.cache_salt),
            provisional_first_token=opened.provisional_first_token,
        )

    def _check(self, opened: pb.OpenDecode) -> Scale:
        config = self._config
        min_chains = opened.min_chains if opened.HasField("min_chains") else None
        scale = Scale.of(ScaleWish(num_chains=opened.num_chains, min_chains=min_chains), config.num_chains)
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
        return scale


def _resumed(job: DecodeJob) -> Resumed:
    return Resumed(
        request_id=job.request_id,
        num_prompt_tokens=len(job.token_ids),
        num_chains=job.scale.value.num_chains,
        max_new_tokens=job.max_new_tokens,
        remaining_s=0.0 if job.deadline is None else job.deadline.remaining_s(),
    )
