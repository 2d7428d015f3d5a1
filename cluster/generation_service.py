"""GenerationService, the gRPC adapter of the front door: messages become requests, events become messages."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc

from cluster.accounts import Accounts
from cluster.client_tokens import Client, Clients
from cluster.front_door.front_door import FrontDoor
from cluster.front_door.prompt import PromptPart
from cluster.metrics import RequestMetrics
from colm.errors import InvalidRequest, Unauthenticated
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
        front_door: serves the requests.
        upload_idle_s: longest pause between two pieces of a prompt.
        clients: who calls.
        accounts: what each of them may take.
        metrics: counts the requests.
        metrics_address: where Prometheus reads them; empty where it does not.
    """

    def __init__(
        self,
        front_door: FrontDoor,
        *,
        upload_idle_s: float,
        clients: Clients,
        accounts: Accounts,
        metrics: RequestMetrics,
        metrics_address: str = "",
    ) -> None:
        self._front_door = front_door
        self._upload_idle_s = upload_idle_s
        self._clients = clients
        self._accounts = accounts
        self._metrics = metrics
        self._metrics_address = metrics_address

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        add_GenerationServiceServicer_to_server(self, server)

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve one request; see the .proto file."""
        async with answering(context, "generate"), AsyncExitStack() as stack:
            seen = stack.enter_context(self._metrics.request((client := self._caller(context)).name))
            usage = stack.enter_context(self._accounts.open(client))
            await stack.enter_async_context(self._clients.while_admitted(client))
            first, door = await read_first(request_iterator, "resume"), self._front_door
            of_caller = {"owner": client.name, "caller_waits_s": context.time_remaining()}
            changes = read_changes(request_iterator)
            if first.WhichOneof("part") == "resume":
                seen.is_resumed = True
                answer = door.resume(first.resume.answer_key, first.resume.num_tokens, changes=changes, **of_caller)
            else:
                if first.open.answer_token_ids:
                    self._metrics.continued.inc()
                seen.asks(door.model_of(first.open.model).name)
                prompt = usage.counted(_prompt(request_iterator, self._upload_idle_s))
                answer = door.generate(generate_request_from_pb(first.open), prompt, changes=changes, **of_caller)
            async for event in await stack.enter_async_context(answer):
                usage.see(event)
                seen.see(event)
                await context.write(gateway_response(event))

    async def GetClusterStatus(
        self,
        request: pb.GetClusterStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,
    ) -> pb.GetClusterStatusResponse:
        """Report models, nodes and load; where the nodes are, to the operator alone."""
        async with answering(context, "status"):
            status = replace(self._front_door.status(), metrics_address=self._metrics_address)
            return cluster_status_to_pb(status if self._caller(context).is_operator else status.without_places())
        raise AssertionError("answering ends the call")

    def _caller(self, context: grpc.aio.ServicerContext) -> Client:
        client = self._clients.of(shown_token(context.invocation_metadata()))
        if client is None:  # revoked since the call was let in
            raise Unauthenticated("the token is wrong")
        return client


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
