"""The OpenAPI schema of what the gateway serves over HTTP: every path, body and error."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from cluster.openai.errors import statuses
from cluster.openai.schema import ChatRequest, CompletionRequest
from cluster.status_page.board import Shown

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": "number", "minimum": 0}
_NULL: Schema = {"type": "null"}
_LOGPROB: Schema = {"type": "number", "maximum": 0}
_REASON: Schema = {"enum": ["stop", "length"]}
_OF_READING = (400, 401, 500)
_EVENTS = "server-sent events where `stream` is true: the data of each is one chunk, of the last `[DONE]` or an error"


@cache
def document() -> Schema:
    """The schema, in OpenAPI 3.1."""
    _, bodies = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "colm-serve",
            "version": "v1",
            "description": "OpenAI's protocol, with fields of this system's own. A connection too many gets a 503 of "
            "plain text, whatever it asks for.",
        },
        "security": [{"token": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": bodies["$defs"] | _answers() | _status(),
        },
    }


def _paths() -> Schema:
    all_errors = tuple(statuses())
    return {
        "/health": {
            "get": _operation("Whether the gateway runs", _object(status={"const": "ok"}), (503,), is_open=True)
        },
        "/openapi.json": {"get": _operation("This document", {"type": "object"}, (), is_open=True)},
        "/": {"get": _operation("The status page", _TEXT, (), media_type="text/html", is_open=True)},
        "/status.json": {"get": _operation("Its figures, for the operator", _ref("Status"), (401, 500))},
        "/v1/models": {"get": _operation("The models", _list("Model", has_more=None), (401, 500))},
        "/v1/models/{name}": {"get": _operation("One of them", _ref("Model"), (401, 404, 500)), **_in_path("name")},
        "/v1/chat/completions": {
            "post": _operation(
                "Answer a conversation",
                _ref("ChatCompletion"),
                all_errors,
                body=_json(_ref("ChatRequest")),
                events=_ref("ChatCompletionChunk"),
            )
        },
        "/v1/completions": {
            "post": _operation(
                "Go on with a text",
                _ref("Completion"),
                all_errors,
                body=_json(_ref("CompletionRequest")),
                events=_ref("CompletionChunk"),
            )
        },
        "/v1/files": {
            "get": _operation("The caller's documents", _list("File", has_more={"const": False}), (401, 500)),
            "post": _operation(
                "Keep a document", _ref("File"), (*_OF_READING, 429, 504), body={"multipart/form-data": _UPLOAD}
            ),
        },
        "/v1/files/{file_id}": {
            "get": _operation("One of them", _ref("File"), _OF_READING),
            "delete": _operation(
                "Forget it", _object(id=_TEXT, object={"const": "file"}, deleted={"const": True}), _OF_READING
            ),
            **_in_path("file_id"),
        },
        "/v1/files/{file_id}/content": {
            "get": _operation("Its text", {"type": "string"}, _OF_READING, media_type="application/octet-stream"),
            **_in_path("file_id"),
        },
    }


_UPLOAD: Schema = {
    "schema": {
        "type": "object",
        "properties": {
            "file": {"type": "string", "contentMediaType": "application/octet-stream", "description": "UTF-8"},
            "purpose": {"enum": ["user_data", "assistants", "document"]},
        },
        "required": ["file", "purpose"],
    }
}


def _answers() -> Schema:
    named = _object(token=_TEXT, logprob=_LOGPROB, bytes=_array({"type": "integer", "minimum": 0, "maximum": 255}))
    logprobs = _object(**named["properties"], top_logprobs=_array(_ref("NamedToken")))
    choice = {"index": _COUNT, "finish_reason": _REASON}
    chunk = {"index": _COUNT, "finish_reason": _or_null(_REASON)}
    chats, texts = _or_null(_ref("ChatLogprobs")), _or_null(_ref("CompletionLogprobs"))
    message = _object(role={"const": "assistant"}, content=_TEXT, refusal=_NULL)
    delta = _object((), role={"const": "assistant"}, content=_TEXT)
    ends = {"usage": _ref("Usage"), "colm": _array(_ref("Details"))}
    scale = {"num_chains": {"type": "integer", "minimum": 1}}
    of_token: Schema = {**scale, "confirms_provisional": {"type": "boolean"}}
    of_chunk: Schema = {**ends, "provisional_token": _object(index=_COUNT, token_id=_COUNT, text=_TEXT)}
    return {
        "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))),
        "Model": _object(
            id=_TEXT,
            object={"const": "model"},
            created=_COUNT,
            owned_by=_TEXT,
            colm=_object(chains=_array(_COUNT), max_context_tokens=_COUNT),
        ),
        "File": _object(
            id=_TEXT,
            object={"const": "file"},
            bytes=_COUNT,
            created_at=_COUNT,
            filename=_TEXT,
            purpose=_TEXT,
            status={"enum": ["processed", "error"]},
        ),
        "Usage": _object(
            ("prompt_tokens", "completion_tokens", "total_tokens"),
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
            total_tokens=_COUNT,
            prompt_tokens_details=_object(cached_tokens=_COUNT),
        ),
        "Details": _object(
            num_chains=_or_null(scale["num_chains"]),
            tokens_by_scale={"type": "object", "additionalProperties": _COUNT},
            queue_s=_SECONDS,
            prefill_s=_SECONDS,
            first_token_s=_SECONDS,
            provisional_token_s=_or_null(_SECONDS),
            decode_s=_SECONDS,
            kv_received_bytes=_COUNT,
        ),
        "NamedToken": named,
        "ChatLogprobs": _object(content=_array(logprobs), refusal=_NULL),
        "CompletionLogprobs": _object(
            tokens=_array(_TEXT),
            token_logprobs=_array(_LOGPROB),
            top_logprobs=_array({"type": "object", "additionalProperties": _LOGPROB}),
            text_offset=_array(_COUNT),
        ),
        "ChatCompletion": _answer("chat.completion", _object(**choice, message=message, logprobs=chats), **ends),
        "Completion": _answer("text_completion", _object(**choice, text=_TEXT, logprobs=texts), **ends),
        "ChatCompletionChunk": _answer(
            "chat.completion.chunk", _open(_object(**chunk, delta=delta, logprobs=chats), **of_token), optional=of_chunk
        ),
        "CompletionChunk": _answer(
            "text_completion", _open(_object(**chunk, text=_TEXT, logprobs=texts), **of_token), optional=of_chunk
        ),
    }


def _status() -> Schema:
    status = TypeAdapter(Shown).json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    return {**status.pop("$defs"), "Status": status}


def _answer(kind: str, choice: Schema, optional: Mapping[str, Schema] | None = None, **more: Schema) -> Schema:
    whole = _object(
        id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_array(choice), **more
    )  # fmt: skip
    return _open(whole, **(optional or {}))


def _object(required: tuple[str, ...] | None = None, /, **properties: Schema) -> Schema:
    """All of these properties and no others; each must be there unless some are named."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _open(schema: Schema, **optional: Schema) -> Schema:
    return schema | {"properties": schema["properties"] | optional}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(name: str, has_more: Schema | None) -> Schema:
    more = {} if has_more is None else {"has_more": has_more}
    return _object(object={"const": "list"}, data=_array(_ref(name)), **more)


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _in_path(name: str) -> Schema:
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": _TEXT}]}


def _operation(
    summary: str,
    answer: Schema,
    errors: tuple[int, ...],
    *,
    body: Schema | None = None,
    events: Schema | None = None,
    media_type: str = "application/json",
    is_open: bool = False,
) -> Schema:
    content = {media_type: {"schema": answer}}
    if events is not None:
        content["text/event-stream"] = {"schema": events}
    responses: Schema = {"200": {"description": summary if events is None else _EVENTS, "content": content}}
    for status in errors:
        responses[str(status)] = {"description": statuses()[status], "content": _json(_ref("Error"))}
        if status in (429, 503):
            waits = {
                "description": "seconds until another try is worth it",
                "schema": {"type": "integer", "minimum": 1},
            }
            responses[str(status)]["headers"] = {"Retry-After": waits}
    return {
        "summary": summary,
        **({"requestBody": {"required": True, "content": body}} if body is not None else {}),
        "responses": responses,
        **({"security": []} if is_open else {}),
    }
