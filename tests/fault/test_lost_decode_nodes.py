"""Decode nodes that are lost in the middle of an answer: another one goes on with it, and nothing else is different."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from colm_kernels import native

from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.errors import InvalidRequest
from colm.events import Accepted, Event, Finished, Queued, Token, WaitsFor
from colm.placement import Placement
from colm.sampling import Constraint, SamplingParams
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from prefill_node.node import PrefillNode
from tests.answers import assert_same_answer, text_of
from tests.gates import gate_before
from tests.gateway import TakingTurns, gateway
from tests.nodes import decode, decode_node, decode_requests, prefill_node
from tests.tiny import tiny_checkpoint, tiny_config

SHORT, LONG = list(range(5, 25)), list(range(5, 105))
ENDLESS = SamplingParams(ignore_eos=True)
SEEDED = SamplingParams(ignore_eos=True, temperature=1.3, top_p=0.9, seed=11, top_logprobs=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(vocab_size=270), tokenizer=True)


@pytest.fixture
async def prefill(checkpoint: Checkpoint) -> AsyncIterator[PrefillNode]:
    async with prefill_node(str(checkpoint.path)) as node:
        yield node


@pytest.fixture
async def nodes(checkpoint: Checkpoint, prefill: PrefillNode) -> AsyncIterator[list[DecodeNode]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(decode_node(str(checkpoint.path), [prefill.address])) for _ in range(3)]


async def ask(address: str, **options: Any) -> list[Event]:
    async with AsyncClient(address) as client:
        return [event async for event in client.generate(**options)]


async def ask_and_lose(address: str, nodes: list[DecodeNode], *losses: int, **options: Any) -> list[Event]:
    """Ask; whoever works goes down before its step of the first number, counted from 0; its successor; and so on."""
    steps, losses_left, held = Counter[DecodeEngine](), [*losses], list[DecodeEngine]()

    def is_next(engine: DecodeEngine, _: object) -> bool:
        steps[engine] += 1
        if not losses_left or engine in held or steps[engine] <= losses_left[0]:
            return False
        held.append(engine)
        return True

    with gate_before(DecodeEngine, "step", is_next) as gate:
        asking = asyncio.create_task(ask(address, **options))
        while losses_left:
            await gate.until_reached()
            (node,) = (node for node in nodes if node.owner._loop._engine is held[-1])
            del losses_left[0]
            gate.reached.clear()
            await node._server.stop(0)
        return await asking


@pytest.mark.parametrize(
    ("prompt", "sampling", "num_steps"),
    [(LONG, ENDLESS, 0), (LONG, ENDLESS, 39), (LONG, SEEDED, 2), (LONG, SEEDED, 17), (SHORT, SEEDED, 1)],
)
async def test_another_node_goes_on_with_the_answer_of_a_lost_one(
    checkpoint: Checkpoint, nodes: list[DecodeNode], prompt: list[int], sampling: SamplingParams, num_steps: int
) -> None:
    """Bug: a decode node that died after its first event cost the client the answer."""
    pool = TakingTurns([node.address for node in nodes])
    options = {"token_ids": prompt, "max_new_tokens": 40, "sampling": sampling, "num_chains": 2}
    async with gateway(checkpoint.config, pool, num_decode_nodes=len(nodes)) as address:
        events = await ask_and_lose(address, nodes, num_steps, **options)
        undisturbed = await ask(address, **options)
    assert pool.lent[0] not in pool.lent[1:2]
    assert_same_answer(events, undisturbed)
    assert [type(event) for event in events].count(Accepted) == 1
    assert Queued(waits_for=WaitsFor.DECODE_NODE, num_ahead=0) in events
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_decode_nodes == 2
    assert end.timings.first_token_s > 0


async def test_whoever_goes_on_holds_the_answer_to_its_grammar_and_counts_what_it_has(
    checkpoint: Checkpoint, nodes: list[DecodeNode]
) -> None:
    """Lost in the middle of a word of which the grammar allows so many more letters."""
    words = Constraint(kind="regex", text="([a-z]{2,6} ){4}end")
    sampling = replace(SEEDED, presence_penalty=0.8, frequency_penalty=0.3, repetition_penalty=1.3, constraint=words)
    options = {"token_ids": SHORT, "max_new_tokens": 60, "sampling": sampling, "num_chains": 3}
    pool = TakingTurns([node.address for node in nodes])
    tokenizer = Tokenizer.load(checkpoint)
    async with gateway(checkpoint.config, pool, tokenizer, num_decode_nodes=len(nodes)) as address:
        undisturbed = await ask(address, **options)
        pool.lent.clear()
        events = await ask_and_lose(address, nodes, 6, **options)
    assert re.fullmatch(words.text, text_of(undisturbed))
    assert_same_answer(events, undisturbed)
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_decode_nodes == 2


async def test_the_prompt_of_a_lost_node_is_not_computed_again(checkpoint: Checkpoint) -> None:
    path, prompt = str(checkpoint.path), LONG
    options = {"token_ids": prompt, "max_new_tokens": 40, "sampling": SEEDED, "num_chains": 2}
    async with (
        prefill_node(path, prefix_cache_bytes=64 << 20) as prefill,
        decode_node(path, [prefill.address]) as one,
        decode_node(path, [prefill.address]) as other,
    ):
        nodes = [one, other]
        pool = TakingTurns([node.address for node in nodes])
        async with gateway(checkpoint.config, pool, num_decode_nodes=len(nodes)) as address:
            events = await ask_and_lose(address, nodes, 17, **options)
        assert prefill.service._loop is not None
        num_computed = prefill.service._loop.counts.num_tokens
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_decode_nodes == 2
    assert end.usage.num_prefill_cached_tokens == end.usage.num_prefill_tokens == len(prompt) - 1 == num_computed


async def test_an_answer_over_int8_pages_goes_on_with_the_same_tokens(
    checkpoint: Checkpoint, prefill: PrefillNode
) -> None:
    """What the lost node had made is prefilled, so its keys and values are the lost ones but for int8's error."""
    options = {"token_ids": LONG, "max_new_tokens": 12, "sampling": replace(ENDLESS, top_logprobs=2), "num_chains": 2}
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(decode_node(str(checkpoint.path), [prefill.address], kv_cache_dtype="int8"))
            for _ in range(3)
        ]
        pool = TakingTurns([node.address for node in nodes])
        async with gateway(checkpoint.config, pool, num_decode_nodes=len(nodes)) as address:
            undisturbed = await ask(address, **options)
            events = await ask_and_lose(address, nodes, 5, **options)
    tokens, expected = ([event for event in of if isinstance(event, Token)] for of in (events, undisturbed))
    gaps = [token.top_logprobs[0][1] - token.top_logprobs[1][1] for token in expected]
    assert min(gaps) > 0.02, "too close for int8"
    assert [token.token_id for token in tokens] == [token.token_id for token in expected]
    assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in expected], abs=0.01)
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.num_decode_nodes == 2


async def test_an_answer_survives_the_loss_of_one_node_after_the_other(
    checkpoint: Checkpoint, nodes: list[DecodeNode]
) -> None:
    pool = TakingTurns([node.address for node in nodes])
    options = {"token_ids": LONG, "max_new_tokens": 40, "sampling": SEEDED, "num_chains": 3}
    async with gateway(checkpoint.config, pool, num_decode_nodes=3) as address:
        undisturbed = await ask(address, **options)
        pool.lent.clear()
        # The second reads what the first has made in two steps, which yield a token, and makes seven more.
        events = await ask_and_lose(address, nodes, 20, 9, **options)
    assert_same_answer(events, undisturbed)
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_decode_nodes == 3


@pytest.mark.parametrize("num_steps", [5, 6, 7, 8])
async def test_a_stop_string_that_begins_before_the_loss_ends_the_answer_after_it(
    checkpoint: Checkpoint, nodes: list[DecodeNode], num_steps: int
) -> None:
    pool = TakingTurns([node.address for node in nodes])
    options: dict[str, Any] = {"document": b"Once upon a time", "chat": False, "max_new_tokens": 12}
    sampling = replace(SEEDED, temperature=0.6)
    tokenizer = Tokenizer.load(checkpoint)
    async with gateway(checkpoint.config, pool, tokenizer, num_decode_nodes=3) as address:
        text = text_of(await ask(address, sampling=sampling, **options))
        options["sampling"] = replace(sampling, stop=(text[5:9],))
        undisturbed = await ask(address, **options)
        assert text_of(undisturbed) == text[: text.index(text[5:9])]
        pool.lent.clear()
        assert_same_answer(await ask_and_lose(address, nodes, num_steps, **options), undisturbed)


OWN_BITS = [dtype for dtype in (torch.float32, torch.bfloat16) if native.default_variant(dtype) != "torch"]
"""Of computation, where a row's bits are its own; PyTorch's depend on the rows beside it."""


@pytest.mark.parametrize("dtype", OWN_BITS or [torch.float32], ids=str)
async def test_an_answer_goes_on_with_the_bits_that_it_would_have_had(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    path, placement = str(checkpoint.path), Placement(device=torch.device("cpu"), dtype=dtype, num_threads=1)
    async with (
        prefill_node(path, placement=placement) as prefill,
        decode_node(path, [prefill.address], placement=placement) as node,
    ):
        whole = await decode(node.address, LONG, max_new_tokens=60, num_chains=2, sampling=SEEDED)
        for num_made in (1, 16, 17, 50):
            made = whole.token_ids[:num_made]
            rest = await decode(
                node.address, LONG, max_new_tokens=60, num_chains=2, sampling=SEEDED, made_token_ids=made
            )
            assert (*made, *rest.token_ids) == whole.token_ids
            logprobs = whole.logprobs[num_made:]
            assert rest.logprobs == (logprobs if OWN_BITS else pytest.approx(logprobs, abs=1e-4))


async def test_a_node_that_gets_a_whole_answer_has_only_the_last_word(nodes: list[DecodeNode]) -> None:
    node = nodes[0]
    whole = await decode(node.address, LONG, max_new_tokens=5)
    rest = await decode(node.address, LONG, max_new_tokens=5, made_token_ids=whole.token_ids)
    assert rest.token_ids == ()
    assert (rest.usage.num_new_tokens, rest.usage.num_kv_streams) == (5, 0)
    assert [response.WhichOneof("event") for response in rest.responses] == ["reserved", "finished"]


@pytest.mark.parametrize(
    ("made_token_ids", "complaint"),
    [((7, 7, 7), "num_answer_tokens=3: must be at most max_new_tokens=2"), ((2, 7), "the answer ended after 1")],
)
async def test_an_answer_so_far_that_none_can_be_is_refused(
    nodes: list[DecodeNode], made_token_ids: tuple[int, ...], complaint: str
) -> None:
    requests = decode_requests(LONG, max_new_tokens=2, sampling=SamplingParams(), made_token_ids=made_token_ids)
    async with open_channel(nodes[0].address, Security()) as channel:
        call = DecodeServiceStub(channel).Decode(iter(requests))
        with pytest.raises(InvalidRequest, match=complaint), Outcome(call).errors("decode node"):
            _ = [event async for event in call]
