"""Calls over OpenAI's protocol that are refused: by whom, with which status and words."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from cluster.audit_log import AuditLog
from cluster.client_tokens import Clients, TokenLimits, create_token
from colm.checkpoint import Checkpoint
from colm.text.tokenizer import Tokenizer
from decode_node.node import DecodeNode
from tests.openai_clients import GREEDY, QUESTION, TOKEN, client_of


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"4000000": 1}}, "logit_bias"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 8}, "min_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "x"}}, "response_format"),
        ({"extra_body": {"guided_json": "[]"}}, "json_schema"),
        ({"extra_body": {"guided_regex": "(x"}}, "regex"),
        ({"extra_body": {"prompt_logprobs": 0}}, "prompt_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"temperature": 11}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"extra_body": {"scale": 7}}, "num_chains"),
        ({"extra_body": {"scale": 1, "num_chains": 2}}, "body"),
        ({"extra_body": {"scale": 1, "min_chains": 2}}, "min_chains"),
        ({"extra_body": {"scale": "large"}}, "scale.int"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "body"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    client: AsyncOpenAI, fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.chat.completions.create(**{"model": "tiny", "messages": QUESTION} | fields)
    assert refusal.value.type == "invalid_request_error"
    if param is not None:
        assert refusal.value.param == param


async def test_a_prompt_is_not_sent_back_and_the_refusal_says_why(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="runs no output head over it") as refusal:
        await client.completions.create(model="tiny", prompt="x", echo=True)
    assert refusal.value.param == "echo"


async def test_without_the_right_token_nothing_is_answered(client: AsyncOpenAI) -> None:
    stranger = client.with_options(api_key="wrong")
    for call in (stranger.models.list(), stranger.files.list()):
        with pytest.raises(openai.AuthenticationError, match="the token is wrong"):
            async for _ in call:
                pass
    with pytest.raises(openai.AuthenticationError) as refusal:
        await stranger.chat.completions.create(model="tiny", messages=QUESTION)
    assert refusal.value.code == "invalid_api_key"


async def test_a_client_without_room_is_told_to_come_again(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.json"
    token = create_token(tokens, "alice", TokenLimits(max_requests=1))
    audit = AuditLog(tmp_path / "audit", keep_days=1)
    async with client_of(checkpoint, tokenizer, node, token, clients=Clients(TOKEN, tokens), audit_log=audit) as client:
        with pytest.raises(openai.RateLimitError, match="may have 1 requests at once") as refusal:
            await client.chat.completions.create(model="tiny", messages=QUESTION, n=2)
        assert refusal.value.response.headers["retry-after"] == "1"
        await client.chat.completions.create(messages=QUESTION, max_tokens=2, **GREEDY)
    (log,) = (tmp_path / "audit").iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["client"] for line in lines] == ["alice"] * 3
    assert lines[-1]["outcome"] == "finished"
    assert QUESTION[0]["content"] not in log.read_text()
