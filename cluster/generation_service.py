"""GenerationService, the gRPC adapter of the front door: messages become requests, events become messages."""

from collections.abc import AsyncIterator

import grpc

from cluster.front_door.front_door import FrontDoor
from cluster.front_door.prompt import PromptPart
from colm.errors import InvalidRequest
from colm.wire.messages import (
    cluster_status_to_pb,
    gateway_response,
    generate_request_from_pb,
    token_ids_from_pb,
)
from colm.wire.prompt_stream import read_open, read_pieces
from colm.wire.status import answering
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)


class GenerationService(GenerationServiceServicer):
    """Serves `Generate` and `GetClusterStatus`.

    Args:
        front_door: serves the requests.
        upload_idle_s: longest pause between two pieces of a prompt.
    """

    def __init__(self, front_door: FrontDoor, *, upload_idle_s: float) -> None:
        self._front_door = front_door
        self._upload_idle_s = upload_idle_s

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        add_GenerationServiceServicer_to_server(self, server)

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve one request; see the .proto file."""
        async with answering(context, "generate"):
            request = generate_request_from_pb(await read_open(request_iterator))
            prompt, waits_s = _prompt(request_iterator, self._upload_idle_s), context.time_remaining()
            async with self._front_door.generate(request, prompt, caller_waits_s=waits_s) as events:
                async for event in events:
                    await context.write(gateway_response(event))

    async def GetClusterStatus(
        self,
        request: pb.GetClusterStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> pb.GetClusterStatusResponse:
        """Report models, nodes and load."""
        return cluster_status_to_pb(self._front_door.status())


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
