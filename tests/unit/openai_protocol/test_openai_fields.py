"""Fields of this system beside OpenAI's own: scale, provisional tokens, documents."""

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from cluster.client_tokens import Clients, TokenLimits, create_token
from colm.checkpoint import Checkpoint
from colm.text.tokenizer import Tokenizer
from decode_node.auto_scale import AutoScale
from decode_node.node import DecodeNode
from tests.nodes import decode
from tests.openai_clients import GREEDY, QUESTION, TOKEN, client_of, prompt_ids


async def test_the_scale_is_chosen_beside_openais_own_fields(
    client: AsyncOpenAI, tokenizer: Tokenizer, node: DecodeNode
) -> None:
    ids = prompt_ids(tokenizer, QUESTION[0]["content"])
    for scale in (1, 2):
        plain = await decode(node.address, ids, num_chains=scale, max_new_tokens=6)
        answer = await client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=6,
            temperature=0,
            extra_body={"scale": scale, "ignore_eos": True, "attention": "sparse"},
        )
        assert answer.choices[0].message.content == tokenizer.decode(plain.token_ids)
        assert answer.model_dump()["colm"][0]["num_chains"] == scale


async def test_a_streamed_answer_that_leaves_its_scale_to_the_node_says_each_tokens(
    client: AsyncOpenAI, node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("note", "rest"):
        monkeypatch.setattr(AutoScale, method, lambda *_: None)
    node.owner._loop.auto_scale.level = 1
    for floor, scale in ((None, 1), (2, 2)):
        chunks = await client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            extra_body={"scale": "auto", "min_chains": floor, "ignore_eos": True},
        )
        bodies = [chunk.model_dump() async for chunk in chunks]
        choices = [choice for body in bodies for choice in body["choices"] if choice.get("logprobs")]
        assert [choice["num_chains"] for choice in choices] == [scale] * 6
        assert bodies[-1]["colm"][0]["tokens_by_scale"] == {str(scale): 6}


async def test_a_provisional_token_stands_beside_a_streams_choices_and_adds_nothing_to_them(
    client: AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    """A client that knows nothing of it adds up the same text."""
    question: Any = [{"role": "user", "content": "what is the word that nobody says? " * 9}]
    streamed: Any = {"messages": question, "max_tokens": 5, "stream": True, "model": "tiny", "temperature": 0}
    asked = {"ignore_eos": True, "provisional_first_token": True}
    told, plain = [
        [chunk async for chunk in await client.chat.completions.create(**streamed, extra_body=body)]
        for body in (asked, {"ignore_eos": True})
    ]
    guesses = [chunk for chunk in told if "provisional_token" in (chunk.model_extra or {})]
    assert [chunk.choices for chunk in guesses] == [[]]
    extra = (guesses[0].model_extra or {})["provisional_token"]
    assert extra == {"index": 0, "token_id": extra["token_id"], "text": tokenizer.decode([extra["token_id"]])}
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in each if chunk.choices) for each in (told, plain)]
    assert texts[0] == texts[1]
    says = [(each.choices[0].model_extra or {}).get("confirms_provisional") for each in told if each.choices]
    assert sum(each is not None for each in says) == 1
    assert told.index(guesses[0]) < says.index(next(each for each in says if each is not None)) + 1
    with pytest.raises(openai.BadRequestError, match=r"needs stream=true") as refusal:
        await client.chat.completions.create(**streamed | {"stream": False}, extra_body=asked)
    assert refusal.value.status_code == 400


async def test_a_document_is_uploaded_once_and_asked_about_by_its_owner_alone(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.json"
    other = create_token(tokens, "alice", TokenLimits())
    text = "a long document. " * 5
    async with client_of(checkpoint, tokenizer, node, clients=Clients(TOKEN, tokens)) as client:
        file = await client.files.create(file=("book.txt", text.encode()), purpose="user_data")
        assert (file.bytes, file.filename, file.status) == (len(text), "book.txt", "processed")
        assert [each.id async for each in client.files.list()] == [file.id]
        assert (await client.files.content(file.id)).text == text
        options: Any = GREEDY | {"extra_body": {"ignore_eos": True, "document": file.id}}
        answer = await client.chat.completions.create(messages=QUESTION, max_tokens=4, **options)
        ids = tokenizer.encode_prompt(document=text, prompt=QUESTION[0]["content"], chat=True)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
        stranger = client.with_options(api_key=other)
        with pytest.raises(openai.BadRequestError, match="no file of yours"):
            await stranger.chat.completions.create(messages=QUESTION, **options)
        assert not [each async for each in stranger.files.list()]
        await client.files.delete(file.id)
        with pytest.raises(openai.BadRequestError, match="no file of yours"):
            await client.files.retrieve(file.id)


async def test_files_are_bounded_and_must_be_text(
    checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode
) -> None:
    async with client_of(checkpoint, tokenizer, node, max_files_bytes=100, max_document_bytes=80) as client:
        with pytest.raises(openai.BadRequestError, match="at most 80 bytes"):
            await client.files.create(file=("a", b"x" * 81), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="must be UTF-8 text; byte 1 breaks it"):
            await client.files.create(file=("a", b"x\xff"), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="purpose='fine-tune': must be one of"):
            await client.files.create(file=("a", b"x"), purpose="fine-tune")
        first = await client.files.create(file=("a", b"x" * 80), purpose="user_data")
        with pytest.raises(openai.RateLimitError, match="delete some"):
            await client.files.create(file=("a", b"x" * 30), purpose="user_data")
        await client.files.delete(first.id)
        await client.files.create(file=("a", b"x" * 30), purpose="user_data")
