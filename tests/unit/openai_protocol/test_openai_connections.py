"""Connections of OpenAI's clients: bodies, heads, certificates."""

import asyncio
import ssl
from pathlib import Path

import openai
import pytest
from httpx2 import AsyncClient as HttpClient
from httpx2 import TransportError
from openai import AsyncOpenAI

from colm.checkpoint import Checkpoint
from colm.text.tokenizer import Tokenizer
from colm.wire import http_server
from colm.wire.security import Tls, new_tls
from decode_node.node import DecodeNode
from tests.gates import LIMIT_S
from tests.gateway import TakingTurns, http_gateway
from tests.openai_clients import GREEDY, QUESTION


async def test_what_is_no_json_is_refused_and_too_large_a_body_too(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode
) -> None:
    pool = TakingTurns([node.address])
    async with (
        http_gateway(checkpoint.config, pool, tokenizer, max_document_bytes=100) as address,
        HttpClient(base_url=f"http://{address}") as http,
    ):
        for body, shown in ((b"{", "must be JSON"), (b"[]", "body"), (b"\xff", "must be JSON")):
            answer = await http.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400
            assert shown in answer.text
        answer = await http.post("/v1/completions", content=b" " * (1 << 20) + b" " * 101)
        assert answer.status_code == 400
        assert "at most" in answer.json()["error"]["message"]
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/v2")).status_code == 404


async def test_a_head_that_does_not_come_closes_the_connection(
    checkpoint: Checkpoint, node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.05)
    async with http_gateway(checkpoint.config, TakingTurns([node.address])) as address:
        host, port = address.split(":")
        for begun in (b"", b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(begun)
            async with asyncio.timeout(LIMIT_S):
                assert await reader.read() == b""
            writer.close()


async def test_over_tls_the_clusters_own_authority_is_what_a_client_trusts(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode, tmp_path: Path
) -> None:
    tls = new_tls()
    (tmp_path / "ca.pem").write_bytes(tls.ca_pem)
    async with http_gateway(checkpoint.config, TakingTurns([node.address]), tokenizer, tls=tls) as address:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        async with (
            HttpClient(verify=context) as http,
            AsyncOpenAI(base_url=f"https://{address}/v1", api_key="x", http_client=http) as client,
        ):
            answer = await client.chat.completions.create(messages=QUESTION, max_tokens=2, **GREEDY)
            assert answer.choices[0].finish_reason == "length"
        async with AsyncOpenAI(base_url=f"https://{address}/v1", api_key="x", max_retries=0) as stranger:
            with pytest.raises(openai.APIConnectionError):
                await stranger.models.list()


async def test_a_renewed_certificate_is_shown_from_the_next_connection_on(
    checkpoint: Checkpoint, node: DecodeNode
) -> None:
    class Renewed:
        tls = new_tls()

        def current(self) -> Tls:
            return self.tls

    source = Renewed()
    async with http_gateway(checkpoint.config, TakingTurns([node.address]), tls=source) as address:

        async def answers_to(authority: Tls) -> bool:
            context = ssl.create_default_context(cadata=authority.ca_pem.decode())
            try:
                async with HttpClient(verify=context) as http:
                    return (await http.get(f"https://{address}/health")).status_code == 200
            except TransportError:
                return False

        first = source.tls
        assert await answers_to(first)
        source.tls = new_tls()
        assert await answers_to(source.tls)
        assert not await answers_to(first)
