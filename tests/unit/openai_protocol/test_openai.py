"""Answers over OpenAI's protocol, with its own client: whole and streamed, chats and completions."""

import json
from typing import Any

import grpc
import openai
import pytest
from openai import AsyncOpenAI

from colm.checkpoint import Checkpoint
from colm.request import ChatMessage, ChatRole
from colm.sampling import SamplingParams
from colm.text.tokenizer import Tokenizer
from decode_node.node import DecodeNode
from prefill_node.node import PrefillNode
from tests.nodes import TILE_TOKENS, decode, decode_node
from tests.openai_clients import GREEDY, QUESTION, client_of, prompt_ids


async def test_a_chat_is_the_answer_that_a_decode_node_gives(
    client: AsyncOpenAI, tokenizer: Tokenizer, node: DecodeNode
) -> None:
    ids = prompt_ids(tokenizer, QUESTION[0]["content"])
    plain = await decode(node.address, ids, num_chains=3, max_new_tokens=6)
    answer = await client.chat.completions.create(messages=QUESTION, max_completion_tokens=6, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(plain.token_ids)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 6)
    assert answer.model == "tiny"


async def test_a_stream_brings_the_same_text_its_usage_and_its_end(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(messages=QUESTION, max_tokens=9, **GREEDY)
    stream = await client.chat.completions.create(
        messages=QUESTION, max_tokens=9, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(each.delta.content or "" for each in deltas) == whole.choices[0].message.content
    assert [each.finish_reason for each in deltas if each.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_each_chunk_counts_the_tokens_so_far_for_those_who_ask(client: AsyncOpenAI, n: int) -> None:
    """Bug: `continuous_usage_stats` was refused, and with it every request of guidellm."""
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    # With log probabilities every token has a chunk, whether it completes some text or not.
    stream = await client.chat.completions.create(
        messages=QUESTION, max_tokens=5, n=n, logprobs=True, stream=True, stream_options=options, **GREEDY
    )
    *chunks, last = [chunk async for chunk in stream]
    assert last.usage is not None
    for number in range(n):
        usages = [chunk.usage for chunk in chunks if chunk.choices[0].index == number]
        assert all(usage is not None and usage.prompt_tokens == last.usage.prompt_tokens for usage in usages)
        counts = [usage.completion_tokens for usage in usages if usage is not None]
        assert counts == sorted(counts)
        assert set(counts) == set(range(6))
    assert last.usage.completion_tokens == 5 * n


async def test_a_conversation_is_read_whole(client: AsyncOpenAI, tokenizer: Tokenizer, node: DecodeNode) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "and now?"},
    ]
    said: tuple[tuple[ChatRole, str], ...] = (("system", "be brief"), ("user", "hello"), ("assistant", "hi"))
    history = [ChatMessage(role=role, content=content) for role, content in said]
    ids = tokenizer.encode_prompt(document="", prompt="and now?", chat=True, history=history)
    plain = await decode(node.address, ids.tolist(), num_chains=3, max_new_tokens=4)
    answer = await client.chat.completions.create(messages=messages, max_tokens=4, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == tokenizer.decode(plain.token_ids)


async def test_bias_and_penalties_choose_and_log_probabilities_stay_the_models(client: AsyncOpenAI) -> None:
    """A bias of 100 makes one token of all; penalties of -2 for what the answer has keep it there without."""
    wanted: Any = {"prompt": "x", "max_tokens": 4, "logprobs": 1, "model": "tiny", "temperature": 0}
    plain = (await client.completions.create(**wanted)).choices[0].logprobs
    only = (await client.completions.create(logit_bias={"77": 100}, **wanted)).choices[0].logprobs
    assert plain is not None
    assert only is not None
    assert len(set(only.tokens or ())) == 1
    assert only.tokens != plain.tokens
    assert max(only.token_logprobs or ()) < -1  # its logit alone was raised, not its probability
    assert (only.top_logprobs or [])[0] == (plain.top_logprobs or [])[0]
    no_other: Any = {"repetition_penalty": 0.01, "min_p": 1.0}
    same = (await client.completions.create(presence_penalty=-2, extra_body=no_other, **wanted)).choices[0].logprobs
    assert same is not None
    assert len(set(same.tokens or ())) == 1


async def test_an_answer_is_in_the_format_that_is_asked_for(client: AsyncOpenAI) -> None:
    """Of a random model, which would write none of it."""
    asked = {
        "type": "object",
        "properties": {"word": {"enum": ["one", "two"]}, "ok": {"type": "boolean"}},
        "required": ["word", "ok"],
        "additionalProperties": False,
    }
    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked, "strict": True}}
    wanted: Any = {"messages": QUESTION, "max_tokens": 100, "model": "tiny", "seed": 1}
    by_schema = await client.chat.completions.create(response_format=schema, **wanted)
    stream = await client.chat.completions.create(extra_body={"guided_json": asked}, stream=True, **wanted)
    streamed = "".join([each.choices[0].delta.content or "" async for each in stream if each.choices])
    assert by_schema.choices[0].finish_reason == "stop"
    said = json.loads(by_schema.choices[0].message.content or "")
    assert (said["word"] in ("one", "two"), type(said["ok"]), len(said)) == (True, bool, 2)
    assert json.loads(streamed) == said
    by_regex = await client.completions.create(
        prompt="x", max_tokens=9, model="tiny", extra_body={"guided_regex": "(yes|no)"}
    )
    assert by_regex.choices[0].text in ("yes", "no")


async def test_the_answers_of_one_call_have_one_prefill_and_those_of_the_next_have_none(
    checkpoint: Checkpoint, tokenizer: Tokenizer, prefill: PrefillNode
) -> None:
    text = QUESTION[0]["content"] * 8
    num_tokens = len(prompt_ids(tokenizer, text)) - 1
    async with (
        decode_node(
            str(checkpoint.path), [prefill.address], prefix_cache_bytes=16 << 20, prefill_tile_tokens=TILE_TOKENS
        ) as node,
        client_of(checkpoint, tokenizer, node) as client,
    ):
        ask = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_completion_tokens": 3}
        first = await client.chat.completions.create(**ask, n=3, temperature=1.0, seed=1)
        second = await client.chat.completions.create(**ask)
        assert node.owner.prefix.num_hit_tokens == 3 * num_tokens
    assert sorted(answer["kv_received_bytes"] > 0 for answer in first.colm) == [False, False, True]
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == num_tokens


async def test_a_decode_node_checks_the_ids_that_it_looks_up(node: DecodeNode) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="logit_bias=4000000: must be below the vocabulary size"):
        await decode(node.address, [5, 6], sampling=SamplingParams(logit_bias=((4_000_000, 1.0),)))


async def test_completions_take_text_or_ids_and_stop_and_name_their_tokens(
    client: AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode_prompt(document="", prompt="some words to go on with", chat=False).tolist()
    by_text = await client.completions.create(prompt="some words to go on with", max_tokens=8, logprobs=2, **GREEDY)
    by_ids = await client.completions.create(prompt=ids, max_tokens=8, logprobs=2, **GREEDY)
    assert by_text.choices[0].text == by_ids.choices[0].text
    logprobs = by_text.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 8
    offsets = logprobs.text_offset or []
    assert len(offsets) == 8
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(by_text.choices[0].text)
    assert all(len(each) == 2 for each in logprobs.top_logprobs or [])
    stop = by_text.choices[0].text[3:5]
    stopped = await client.completions.create(prompt="some words to go on with", max_tokens=8, stop=stop, **GREEDY)
    assert stopped.choices[0].text == by_text.choices[0].text.split(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"


async def test_each_answer_of_several_has_its_own_seed_and_comes_again(client: AsyncOpenAI) -> None:
    async def texts(**options: Any) -> list[str]:
        answer = await client.completions.create(
            model="tiny", prompt="x", max_tokens=12, temperature=1.0, extra_body={"ignore_eos": True}, **options
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    first = await texts(n=3, seed=5)
    assert await texts(n=3, seed=5) == first
    assert (await texts(seed=6)) == first[1:2]
    assert len(set(first)) == 3


async def test_logprobs_of_a_chat_come_with_bytes_whole_and_streamed(client: AsyncOpenAI) -> None:
    options = {"messages": QUESTION, "max_tokens": 5, "logprobs": True, "top_logprobs": 3} | GREEDY
    whole = await client.chat.completions.create(**options)
    found = whole.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 5
    for each in found.content:
        assert each.top_logprobs[0].logprob == each.logprob
        assert bytes(each.bytes or []).decode(errors="replace") == each.token
    stream = await client.chat.completions.create(stream=True, **options)
    streamed = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices]
    content = [each for logprobs in streamed if logprobs is not None for each in logprobs.content or []]
    assert content == found.content


async def test_models_are_listed_and_another_one_is_not_found(checkpoint: Checkpoint, client: AsyncOpenAI) -> None:
    (model,) = [each async for each in client.models.list()]
    assert (model.id, model.owned_by) == ("tiny", "colm-serve")
    assert (await client.models.retrieve("tiny")).model_dump()["colm"]["chains"] == list(checkpoint.config.chains)
    with pytest.raises(openai.NotFoundError, match="this cluster serves 'tiny'") as refusal:
        await client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert refusal.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-5")
