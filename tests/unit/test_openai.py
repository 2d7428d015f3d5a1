"""OpenAI's protocol, spoken by OpenAI's own package to a gateway over real nodes."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from httpx2 import AsyncClient as HttpClient
from httpx2 import TransportError
from openai import AsyncOpenAI

from cluster.audit_log import AuditLog
from cluster.client_tokens import Clients, TokenLimits, create_token, revoke_token
from cluster.front_door.front_door import FrontDoor
from colm.checkpoint import Checkpoint
from colm.request import ChatMessage, ChatRole
from colm.sampling import SamplingParams
from colm.text.tokenizer import Tokenizer
from colm.wire import http_server
from colm.wire.security import Tls, new_tls
from decode_node.auto_scale import AutoScale
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S, gate_before
from tests.gateway import TakingTurns, http_gateway
from tests.nodes import TILE_TOKENS, decode, decode_node, prefill_node, until_idle, until_prefill_idle
from tests.tiny import tiny_checkpoint

TOKEN = "the operator's"
QUESTION: Any = [{"role": "user", "content": "what is the word that nobody says?"}]
GREEDY: Any = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


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


@pytest.fixture
async def client(checkpoint: Checkpoint, tokenizer: Tokenizer, node: DecodeNode) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(checkpoint, tokenizer, node) as client:
        yield client


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode_prompt(document="", prompt=text, chat=True).tolist()
    return ids


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


async def test_models_are_listed_and_another_one_is_not_found(checkpoint: Checkpoint, client: AsyncOpenAI) -> None:
    (model,) = [each async for each in client.models.list()]
    assert (model.id, model.owned_by) == ("tiny", "colm-serve")
    assert (await client.models.retrieve("tiny")).model_dump()["colm"]["chains"] == list(checkpoint.config.chains)
    with pytest.raises(openai.NotFoundError, match="this cluster serves 'tiny'") as refusal:
        await client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert refusal.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-5")


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
