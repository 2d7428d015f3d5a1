"""OpenAI's own client against a gateway of this process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from openai import AsyncOpenAI

from cluster.client_tokens import Clients
from colm.checkpoint import Checkpoint
from colm.text.tokenizer import Tokenizer
from decode_node.node import DecodeNode
from tests.gateway import TakingTurns, http_gateway

TOKEN = "the operator's"
QUESTION: Any = [{"role": "user", "content": "what is the word that nobody says?"}]
GREEDY: Any = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


@asynccontextmanager
async def client_of(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode, token: str = TOKEN, **options: Any
) -> AsyncIterator[AsyncOpenAI]:
    pool = TakingTurns([node.address])
    options = {"clients": Clients(TOKEN)} | options
    async with (
        http_gateway(checkpoint.config, pool, tokenizer, **options) as address,
        AsyncOpenAI(base_url=f"http://{address}/v1", api_key=token, max_retries=0) as client,
    ):
        yield client


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode_prompt(document="", prompt=text, chat=True).tolist()
    return ids
