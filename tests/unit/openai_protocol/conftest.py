"""A gateway over a tiny model, and OpenAI's own client of it."""

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from colm.checkpoint import Checkpoint
from colm.text.tokenizer import Tokenizer
from decode_node.node import DecodeNode
from prefill_node.node import PrefillNode
from tests.nodes import decode_node, prefill_node
from tests.openai_clients import client_of
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    found = Tokenizer.load(checkpoint)
    assert found is not None
    return found


@pytest.fixture
async def prefill(checkpoint: Checkpoint) -> AsyncIterator[PrefillNode]:
    async with prefill_node(str(checkpoint.path)) as node:
        yield node


@pytest.fixture
async def node(checkpoint: Checkpoint, prefill: PrefillNode) -> AsyncIterator[DecodeNode]:
    async with decode_node(str(checkpoint.path), [prefill.address]) as node:
        yield node


@pytest.fixture
async def client(checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(checkpoint, tokenizer, node) as client:
        yield client
