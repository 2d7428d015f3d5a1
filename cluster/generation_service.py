"""GenerationService, the gRPC adapter of the front door: messages become requests, events become messages."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc

from cluster.client_requests import ClientRequests
from cluster.client_tokens import Client
from cluster.front_door.prompt import PromptPart
from colm.errors import InvalidRequest
from colm.wire.messages import (
    cluster_status_to_pb,
    gateway_response,
    generate_request_from_pb,
    token_ids_from_pb,
)
from colm.wire.prompt_stream import read_changes, read_first, read_pieces
from colm.wire.security import shown_token
from colm.wire.status import answering
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)


class GenerationService(GenerationServiceServicer):
    """Serves `Generate` and `GetClusterStatus`.

    Args:
        requests: lets clients' requests in.
        upload_idle_s: longest pause between two pieces of a prompt.
    """

    def __init__(self, requests: ClientRequests, *, upload_idle_s: float) -> None:
        self._requests = requests
        self._upload_idle_s = upload_idle_s

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        add_GenerationServiceServicer_to_server(self, server)

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve one request; see the .proto file."""
        async with answering(context, "generate"), AsyncExitStack() as stack:
            request = await stack.enter_async_context(self._requests.open(self._caller(context)))
            first = await read_first(request_iterator, "resume")
            changes, waits_s = read_changes(request_iterator), context.time_remaining()
            if first.WhichOneof("part") == "resume":
                key, num_tokens = first.resume.answer_key, first.resume.num_tokens
                answer = request.resume(key, num_tokens, changes=changes, caller_waits_s=waits_s)
            else:
                prompt = _prompt(request_iterator, self._upload_idle_s)
                asked = generate_request_from_pb(first.open)
                answer = request.generate(asked, prompt, changes=changes, caller_waits_s=waits_s)
            async for event in await stack.enter_async_context(answer):
                await context.write(gateway_response(event))

    async def GetClusterStatus(
        self,
        request: pb.GetClusterStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,
    ) -> pb.GetClusterStatusResponse:
        """Report models, nodes and load; where the nodes are, to the operator alone."""
        async with answering(context, "status"):
            status = self._requests.front_door.status()
            return cluster_status_to_pb(status if self._caller(context).is_operator else status.without_places())
        raise AssertionError("answering ends the call")

    def _caller(self, context: grpc.aio.ServicerContext) -> Client:
        # Asked again behind the server's own interceptor: the token may have been revoked since.
        return self._requests.clients.require(shown_token(context.invocation_metadata()))


async def _prompt(requests: AsyncIterator[pb.GenerateRequest], idle_s: float) -> AsyncIterator[PromptPart]:
    async for request in read_pieces(requests, idle_s=idle_s):
        match request.WhichOneof("part"):
            case "document":
                yield request.document
            case "token_ids":
                yield token_ids_from_pb(request.token_ids)
            case part:
                raise InvalidRequest(
                    "part", part, "only `document` or `token_ids`, then `end_of_prompt`, may follow `open`"
                )
