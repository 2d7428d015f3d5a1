"""The paths of OpenAI's HTTP protocol that this system serves."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.client_requests import ClientRequests
from cluster.client_tokens import Client
from cluster.front_door.plan import GatewayLimits
from cluster.openai.answers import Shape
from cluster.openai.bodies import OVERHEAD_BYTES, Bodies
from cluster.openai.calls import Call
from cluster.openai.errors import answer_of
from cluster.openai.files import FileStore
from cluster.openai.openapi import document
from cluster.openai.schema import Ask, read_chat, read_completion
from colm import tracing
from colm.errors import GoingAway, InvalidRequest
from colm.nodes import ModelStatus
from colm.text.tokenizer import SEPARATOR
from colm.wire.security import shown_token

_SMALL_BYTES = 64 << 10
"""Of a body that is parsed at once; a larger one is parsed in a thread."""
_PURPOSES = ("user_data", "assistants", "document")


class OpenAiApp:
    """Makes the ASGI application.

    Args:
        requests: lets clients' requests in.
        limits: of requests.
        files: documents that are kept.
    """

    def __init__(self, requests: ClientRequests, *, limits: GatewayLimits, files: FileStore) -> None:
        self._requests = requests
        self._bodies = Bodies(
            max_bytes=limits.max_document_bytes + OVERHEAD_BYTES,
            max_held_bytes=limits.max_upload_bytes,
            idle_s=limits.upload_idle_s,
        )
        self._files = files
        self._max_document_bytes = limits.max_document_bytes

    @property
    def num_held_bytes(self) -> int:
        """Of bodies that are being read or answered."""
        return self._bodies.num_held_bytes

    def asgi(self, *others: Route) -> Starlette:
        """The application, with other paths beside its own."""
        return Starlette(
            routes=[
                *others,
                Route("/health", self._health),
                Route("/openapi.json", self._schema),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._one_model)),
                Route("/v1/chat/completions", self._calls(read_chat), methods=["POST"]),
                Route("/v1/completions", self._calls(read_completion), methods=["POST"]),
                Route("/v1/files", self._guarded(self._list_files)),
                Route("/v1/files", self._guarded(self._add_file), methods=["POST"]),
                Route("/v1/files/{file_id}", self._guarded(self._one_file)),
                Route("/v1/files/{file_id}", self._guarded(self._delete_file), methods=["DELETE"]),
                Route("/v1/files/{file_id}/content", self._guarded(self._file_content)),
            ]
        )

    def _calls(self, read: Callable[[bytes], Ask]) -> "_Endpoint":
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            # The body is held until its call has been answered.
            with self._bodies.counted(Request(scope, receive)) as request:
                response: ASGIApp
                try:
                    with self._requests.reading(client := self._caller(request)):
                        try:
                            body = await request.body()
                        except ClientDisconnect:  # it has asked for nothing yet
                            return
                        is_small = len(body) <= _SMALL_BYTES
                        ask = read(body) if is_small else await asyncio.to_thread(read, body)
                        del body
                        response = await self._call(client, ask)
                except Exception as error:  # noqa: BLE001 - whatever it is, it becomes the call's one answer
                    response = answer_of(error)
                with tracing.continued(request.headers.items()), tracing.span("openai"):
                    await response(scope, receive, send)

        return _Endpoint(answer)

    def _caller(self, request: Request) -> Client:
        return self._requests.clients.require(shown_token(request.headers))

    async def _call(self, client: Client, ask: Ask) -> Call:
        documents = await self._documents(client, ask.documents)
        separator = SEPARATOR.encode()
        document = separator.join([*documents, *([text] if (text := _utf8(ask.text)) else [])])
        model = self._requests.front_door.model_of(ask.requests[0].model)
        shape = Shape(
            is_chat=ask.is_chat,
            model=model.name,
            tokenizer=model.tokenizer,
            wants_logprobs=ask.wants_logprobs,
            counts_along=ask.counts_along,
        )
        return Call(self._requests, client, ask, document, shape)

    async def _documents(self, client: Client, file_ids: Sequence[str]) -> list[bytes]:
        num_bytes, limit = 0, self._max_document_bytes
        for file_id in file_ids:  # before any of them is read: a list may name one file very often
            num_bytes += (await self._files.get(file_id, client)).num_bytes
            if num_bytes > limit:
                raise InvalidRequest("document", f"{num_bytes} bytes", f"at most {limit} bytes, of all files together")
        return [await self._files.content(file_id, client) for file_id in file_ids]

    def _guarded(self, handle: Callable[[Request, Client], Awaitable[Response]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                return await handle(request, self._caller(request))
            except Exception as error:  # noqa: BLE001 - whatever it is, it becomes the request's one answer
                return answer_of(error)

        return answer

    async def _health(self, _: Request) -> Response:
        if self._requests.front_door.is_going:
            return answer_of(GoingAway("the gateway is stopping"))
        return JSONResponse({"status": "ok"})

    async def _schema(self, _: Request) -> Response:
        return JSONResponse(document())

    async def _models(self, request: Request, client: Client) -> Response:  # noqa: ARG002 - the handlers' contract
        models = self._requests.front_door.status().models
        return JSONResponse({"object": "list", "data": [_as_json(each) for each in models]})

    async def _one_model(self, request: Request, client: Client) -> Response:  # noqa: ARG002 - as above
        name = self._requests.front_door.model_of(request.path_params["name"]).name
        (model,) = (each for each in self._requests.front_door.status().models if each.name == name)
        return JSONResponse(_as_json(model))

    async def _list_files(self, _: Request, client: Client) -> Response:
        files = [file.as_json() for file in await self._files.of(client)]
        return JSONResponse({"object": "list", "data": files, "has_more": False})

    async def _add_file(self, request: Request, client: Client) -> Response:
        with self._bodies.counted(request) as counted:
            try:
                async with counted.form(max_files=1, max_fields=8, max_part_size=_SMALL_BYTES) as form:
                    upload, purpose = form.get("file"), form.get("purpose")
                    if not isinstance(upload, UploadFile):
                        raise InvalidRequest("file", upload, "must be a file part of multipart/form-data")
                    if purpose not in _PURPOSES:
                        raise InvalidRequest("purpose", purpose, f"must be one of {', '.join(_PURPOSES)}")
                    content = await upload.read()
                    name = upload.filename or ""
            except MultiPartException as err:
                raise InvalidRequest("body", "", f"must be multipart/form-data: {err.message}") from err
        file = await self._files.add(owner=client, filename=name, purpose=str(purpose), content=content)
        return JSONResponse(file.as_json())

    async def _one_file(self, request: Request, client: Client) -> Response:
        return JSONResponse((await self._files.get(request.path_params["file_id"], client)).as_json())

    async def _delete_file(self, request: Request, client: Client) -> Response:
        file_id = request.path_params["file_id"]
        await self._files.delete(file_id, client)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def _file_content(self, request: Request, client: Client) -> Response:
        content = await self._files.content(request.path_params["file_id"], client)
        return Response(content, media_type="application/octet-stream")


def _as_json(model: ModelStatus) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "colm-serve",
        "colm": {"chains": model.chains, "max_context_tokens": model.max_context_tokens},
    }


class _Endpoint:
    """Starlette takes an object as an ASGI application, and a function as a handler of requests."""

    def __init__(self, run: ASGIApp) -> None:
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(scope, receive, send)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as err:
        raise InvalidRequest("messages", text[err.start : err.start + 8], "holds half a surrogate pair") from err
