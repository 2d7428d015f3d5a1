"""Calls over OpenAI's protocol that end early: clients that leave, errors in mid-stream, gateways that stop."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from httpx2 import AsyncClient as HttpClient
from openai import AsyncOpenAI

from cluster.client_tokens import Clients, TokenLimits, create_token, revoke_token
from cluster.front_door.front_door import FrontDoor
from colm.checkpoint import Checkpoint
from colm.text.tokenizer import Tokenizer
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S, gate_before
from tests.nodes import until_idle, until_prefill_idle
from tests.openai_clients import GREEDY, QUESTION, TOKEN, client_of


async def until_cancelled(node: DecodeNode) -> None:
    """Its one request has been, before it could end by itself."""
    async with asyncio.timeout(LIMIT_S):
        while not node.metrics.get_sample_value("colm_decode_requests_ended_total", {"outcome": "cancelled"}):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("engine", [PrefillEngine, DecodeEngine])
async def test_a_client_that_goes_away_ends_its_request_everywhere(
    client: AsyncOpenAI, prefill: PrefillNode, node: DecodeNode, engine: type
) -> None:
    with gate_before(engine, "step") as gate:
        create = client.chat.completions.create
        asking = asyncio.create_task(create(messages=QUESTION, max_tokens=300, **GREEDY))
        await gate.until_reached()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until_cancelled(node)
        gate.open()
        await until_idle(node)
        await until_prefill_idle(prefill)


async def test_a_reader_of_a_stream_that_goes_away_ends_it_everywhere(client: AsyncOpenAI, node: DecodeNode) -> None:
    with gate_before(DecodeEngine, "step") as gate:
        stream = await client.chat.completions.create(messages=QUESTION, max_tokens=300, stream=True, **GREEDY)
        await gate.until_reached()
        await stream.close()
        await until_cancelled(node)
        gate.open()
        await until_idle(node)


async def test_a_stream_ends_when_its_clients_token_is_revoked(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.json"
    token = create_token(tokens, "alice", TokenLimits())
    async with client_of(checkpoint, tokenizer, node, token, clients=Clients(TOKEN, tokens)) as client:
        with gate_before(DecodeEngine, "step") as gate:
            stream = await client.chat.completions.create(messages=QUESTION, max_tokens=300, stream=True, **GREEDY)
            await gate.until_reached()
            revoke_token(tokens, "alice")
            await until_cancelled(node)
            gate.open()
        with pytest.raises(openai.APIError, match="the token has been revoked"):
            async for _ in stream:
                pass


async def test_an_error_in_mid_stream_is_the_streams_last_word(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps = DecodeEngine.step, 0

    def breaks(self: DecodeEngine, plan: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps >= 3:  # and again at whoever goes on with the answer
            raise RuntimeError("a defect")
        return whole(self, plan)

    monkeypatch.setattr(DecodeEngine, "step", breaks)
    stream = await client.chat.completions.create(messages=QUESTION, max_tokens=300, stream=True, **GREEDY)
    with pytest.raises(openai.APIError, match="decode"):
        async for _ in stream:
            pass


async def test_a_gateway_that_stops_ends_its_streams_with_an_error_and_refuses_the_next_call(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode
) -> None:
    doors: list[FrontDoor] = []
    async with client_of(checkpoint, tokenizer, node, doors=doors) as client, HttpClient() as plain:

        async def read() -> None:
            stream = await client.chat.completions.create(messages=QUESTION, max_tokens=300, stream=True, **GREEDY)
            async for _ in stream:
                await doors[0].drain(0.0)

        with gate_before(DecodeEngine, "step"), pytest.raises(openai.APIError) as last:
            await read()
        assert (last.value.code, "ask again" in last.value.message) == ("unavailable", True)
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(messages=QUESTION, **GREEDY)
        assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "1")
        assert (await plain.get(str(client.base_url.join("/health")))).status_code == 503
        await until_idle(node)
