"""curl over TLS against the gateway's HTTP protocol: what docs/openai.md tells people to type."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.client_tokens import Clients
from colm.text.tokenizer import Tokenizer
from colm.wire.security import new_tls
from tests.gates import LIMIT_S
from tests.gateway import TakingTurns, http_gateway
from tests.nodes import decode_node, prefill_node
from tests.tiny import tiny_checkpoint

TOKEN = "the operator's"
QUESTION = [{"role": "user", "content": "what is the word that nobody says?"}]
HTTP_ERROR, UNTRUSTED = 22, 60
"""Exit codes of curl: an answer of 400 or above with --fail-with-body; a certificate that it does not trust."""

Curl = Callable[..., Awaitable[tuple[int, str]]]
"""Calls a path with curl's options; returns the exit code and what it printed."""


@pytest.fixture(scope="module")
def program() -> str:
    """curl. Its absence is a failure: a skipped test proves nothing."""
    found = shutil.which("curl")
    if found is None:
        pytest.fail("curl is not in PATH, and the protocol is tested with it; install the system's package `curl`")
    return found


@pytest.fixture
async def curl(program: str, tmp_path: Path) -> AsyncIterator[Curl]:
    checkpoint, tls = tiny_checkpoint(tmp_path / "tiny", tokenizer=True), new_tls()
    path, authority = str(checkpoint.path), tmp_path / "ca.pem"
    authority.write_bytes(tls.ca_pem)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address]) as node,
        http_gateway(
            checkpoint.config,
            TakingTurns([node.address]),
            Tokenizer.load(checkpoint),
            clients=Clients(TOKEN),
            tls=tls,
        ) as address,
    ):

        async def call(
            path: str, *options: str, token: str = TOKEN, trusts: Path | None = authority
        ) -> tuple[int, str]:
            trust = ["--cacert", str(trusts)] if trusts else []
            known = ["--silent", "--fail-with-body", "--no-buffer", "-H", f"Authorization: Bearer {token}", *trust]
            process = await asyncio.create_subprocess_exec(
                program, *known, *options, f"https://{address}{path}", stdout=asyncio.subprocess.PIPE
            )
            async with asyncio.timeout(LIMIT_S):
                out, _ = await process.communicate()
            assert process.returncode is not None
            return process.returncode, out.decode()

        yield call


def body(**fields: Any) -> tuple[str, ...]:
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 5, "temperature": 0, "ignore_eos": True} | fields
    return ("-H", "Content-Type: application/json", "--data-binary", json.dumps(asked))


async def test_curl_gets_whole_answers_streams_and_files(curl: Curl, tmp_path: Path) -> None:
    async def found(path: str, *options: str) -> Any:
        status, text = await curl(path, *options)
        assert status == 0, text
        return json.loads(text)

    assert [model["id"] for model in (await found("/v1/models"))["data"]] == ["tiny"]
    whole = await found("/v1/chat/completions", *body())
    assert whole["usage"]["completion_tokens"] == 5

    status, text = await curl("/v1/chat/completions", *body(stream=True, stream_options={"include_usage": True}))
    assert status == 0
    *lines, done = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    *chunks, last = map(json.loads, lines)
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert (done, said, last["usage"]) == ("[DONE]", whole["choices"][0]["message"]["content"], whole["usage"])

    (tmp_path / "book.txt").write_text("a word is a word is a word", encoding="utf-8")
    book = await found("/v1/files", "-F", "purpose=user_data", "-F", f"file=@{tmp_path / 'book.txt'}")
    assert (book["filename"], book["bytes"]) == ("book.txt", 26)
    about = await found("/v1/chat/completions", *body(document=book["id"]))
    assert about["usage"]["prompt_tokens"] > whole["usage"]["prompt_tokens"]


async def test_curl_is_told_what_is_wrong(curl: Curl) -> None:
    for path, options, token, code in (
        ("/v1/models", (), "another", "invalid_api_key"),
        ("/v1/chat/completions", body(model="gpt-5"), TOKEN, "model_not_found"),
        ("/v1/chat/completions", body(colour="red"), TOKEN, None),
    ):
        status, text = await curl(path, *options, token=token)
        error = json.loads(text)["error"]
        assert (status, error["type"], error["code"]) == (HTTP_ERROR, "invalid_request_error", code)
    assert error["param"] == "colour"
    assert await curl("/v1/models", trusts=None) == (UNTRUSTED, "")
