"""The OpenAPI schema that the gateway serves: it is one, and what the gateway takes and answers is what it says."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient as HttpClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from starlette.routing import Route

from cluster.client_tokens import Clients
from cluster.openai.app import OpenAiApp
from cluster.openai.errors import answer_of, statuses
from cluster.openai.openapi import document
from cluster.status_page.routes import StatusPage
from colm import errors
from colm.errors import CapacityExceeded, ColmError, DeadlineExceeded, InvalidRequest, PeerUnavailable, Unauthenticated
from colm.text.tokenizer import Tokenizer
from tests.gateway import LIMITS, TakingTurns, http_gateway
from tests.nodes import decode_node, prefill_node
from tests.tiny import tiny_checkpoint

TOKEN = "the operator's"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "ignore_eos": True}
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}


def schema_of(part: dict[str, Any]) -> Draft202012Validator:
    """A validator of a part of the document."""
    return Draft202012Validator(part | {"components": document()["components"]})


def body_schema(path: str) -> Draft202012Validator:
    return schema_of(document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])


class Asker:
    """Asks the gateway, and holds every answer against the schema."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self.seen: set[tuple[str, str, int, str]] = set()

    async def ask(self, method: str, path: str, of: str | None = None, **options: Any) -> Any:
        answer = await self._http.request(method, path, **options)
        said = document()["paths"][of or path][method.lower()]["responses"][str(answer.status_code)]
        kind = answer.headers["content-type"].partition(";")[0]
        schema = schema_of(said["content"][kind]["schema"])
        if kind == "text/event-stream":
            data = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
            assert data.pop() == "[DONE]"
            found: Any = [json.loads(each) for each in data]
        else:
            found = [answer.json() if kind == "application/json" else answer.text]
        for each in found:
            schema.validate(each)
        self.seen.add((method, of or path, answer.status_code, kind))
        return found[0]


@pytest.fixture
async def asker(tmp_path: Path) -> AsyncIterator[Asker]:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tokenizer=True)
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address]) as node,
        http_gateway(
            checkpoint.config, TakingTurns([node.address]), Tokenizer.load(checkpoint), clients=Clients(TOKEN)
        ) as address,
        HttpClient(base_url=f"http://{address}", headers={"authorization": f"Bearer {TOKEN}"}, timeout=60) as http,
    ):
        yield Asker(http)


def test_it_is_an_openapi_document() -> None:
    validate(document())


def test_it_has_every_route_and_no_other() -> None:
    app: Any = OpenAiApp(None, limits=LIMITS, files=None)  # type: ignore[arg-type]  # nobody calls
    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.asgi(*StatusPage(None, Clients(None)).routes()).routes  # type: ignore[arg-type]
        if isinstance(route, Route)
        for method in route.methods or {"POST"}
        if method != "HEAD"
    }
    listed = {(path, each) for path, item in document()["paths"].items() for each in item if each != "parameters"}
    assert served == listed


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_error_has_its_status_and_shape_there(path: str) -> None:
    said = document()["paths"][path]["post"]["responses"]
    assert said.keys() == {"200", *map(str, statuses())}
    found = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ColmError)]
    assert {InvalidRequest, Unauthenticated, CapacityExceeded, DeadlineExceeded, PeerUnavailable} <= set(found)
    for kind in found:
        error = kind("f", 1, "limit") if issubclass(kind, InvalidRequest) else kind("why")
        answer = answer_of(error)
        schema_of({"$ref": "#/components/schemas/Error"}).validate(json.loads(bytes(answer.body)))
        assert ("Retry-After" in answer.headers) == ("headers" in said[str(answer.status_code)])


async def test_answers_are_as_it_says(asker: Asker) -> None:
    for options in ({}, {"logprobs": True, "top_logprobs": 2, "n": 2}, {"scale": "auto", "response_format": None}):
        body = CHAT | options
        body_schema("/v1/chat/completions").validate(body)
        await asker.ask("POST", "/v1/chat/completions", json=body)
        stream = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        await asker.ask("POST", "/v1/chat/completions", json=body | stream)
    for options in ({}, {"logprobs": 2}, {"prompt": [5, 6, 7], "logit_bias": {"5": 1}}):
        body = TEXT | options
        body_schema("/v1/completions").validate(body)
        await asker.ask("POST", "/v1/completions", json=body)
        await asker.ask("POST", "/v1/completions", json=body | {"stream": True})
    kept = await asker.ask(
        "POST", "/v1/files", files={"file": ("a.txt", b"text")}, data={"purpose": "user_data"}
    )  # fmt: skip
    await asker.ask("GET", "/v1/files")
    for method, more in (("GET", ""), ("GET", "/content"), ("DELETE", ""), ("GET", "")):  # the last one is not there
        await asker.ask(method, f"/v1/files/{kept['id']}{more}", "/v1/files/{file_id}" + more)
    await asker.ask("GET", "/v1/models")
    await asker.ask("GET", "/v1/models/tiny", "/v1/models/{name}")
    await asker.ask("GET", "/v1/models/gpt-5", "/v1/models/{name}")
    nobody = {"authorization": ""}
    assert (await asker.ask("GET", "/openapi.json", headers=nobody)) == document()
    await asker.ask("GET", "/health", headers=nobody)
    await asker.ask("GET", "/", headers=nobody)
    await asker.ask("GET", "/status.json")
    operations = {(method.upper(), path) for path, item in document()["paths"].items() for method in item}
    asked = {(method, path) for method, path, status, _ in asker.seen if status == 200}
    assert asked == {each for each in operations if each[0] != "PARAMETERS"}


FORBIDDEN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"colour": "red"}),
    ("/v1/chat/completions", {"n": 9}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"temperature": "hot"}),
    ("/v1/chat/completions", {"store": True}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"stream_options": {"colour": 1}}),
]


async def test_what_it_forbids_is_refused_and_without_a_token_everything_is(asker: Asker) -> None:
    for path, fields in FORBIDDEN:
        body = (CHAT if "chat" in path else TEXT) | fields
        assert not body_schema(path).is_valid(body), fields
        asker.seen.clear()
        await asker.ask("POST", path, json=body)
        assert asker.seen == {("POST", path, 400, "application/json")}
    for path, item in document()["paths"].items():
        for method in item.keys() - {"parameters"}:
            if "security" not in item[method]:
                options: dict[str, Any] = {"json": CHAT} if method == "post" else {}
                url = path.replace("{name}", "tiny").replace("{file_id}", "f")
                await asker.ask(method.upper(), url, path, headers={"authorization": "Bearer x"}, **options)
                assert (method.upper(), path, 401, "application/json") in asker.seen
