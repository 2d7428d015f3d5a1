"""Chain 1's own next token comes before the answer's first, at most once, and the answer is the one without it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.events import Event, Finished, ProvisionalToken, Token
from colm.sampling import Constraint, SamplingParams
from colm.scale import Changing, Scale
from colm.text.tokenizer import Tokenizer
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from decode_node.provisional import ProvisionalOutcome
from decode_node.requests import DecodeJob
from tests.answers import assert_same_answer
from tests.gates import gate_before
from tests.gateway import TakingTurns, gateway
from tests.nodes import decode_node, prefill_node
from tests.oracle import assert_greedy
from tests.tiny import tiny_checkpoint, tiny_config

SHORT, LONG, OTHER = list(range(5, 25)), list(range(5, 105)), [*range(5, 104), 7]
ENDLESS = SamplingParams(ignore_eos=True)
ASKED: dict[str, Any] = {"provisional_first_token": True, "max_new_tokens": 5, "sampling": ENDLESS, "num_chains": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(vocab_size=270), tokenizer=True)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    found = Tokenizer.load(checkpoint)
    assert found is not None
    return found


@asynccontextmanager
async def cluster(
    checkpoint: Checkpoint, tokenizer: Tokenizer, *, num_nodes: int = 1, keeps_bytes: int = 0, **options: Any
) -> AsyncIterator[tuple[str, list[DecodeNode]]]:
    """A gateway's address, and the decode nodes behind it, with one prefill node that keeps what it has computed."""
    path = str(checkpoint.path)
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(prefill_node(path, prefix_cache_bytes=keeps_bytes))
        nodes = [
            await stack.enter_async_context(decode_node(path, [prefill.address], **options)) for _ in range(num_nodes)
        ]
        running = gateway(checkpoint.config, TakingTurns([each.address for each in nodes]), tokenizer, num_nodes)
        yield await stack.enter_async_context(running), nodes


async def ask(address: str, **options: Any) -> list[Event]:
    async with AsyncClient(address) as client:
        return [event async for event in client.generate(**options)]


def provisional_of(events: list[Event]) -> ProvisionalToken | None:
    """The one that came, which the first token must judge rightly; None if none did."""
    first = next(number for number, event in enumerate(events) if isinstance(event, Token))
    found = [event for event in events if isinstance(event, ProvisionalToken)]
    tokens = [event for event in events if isinstance(event, Token)]
    assert len(found) <= 1
    assert found == [event for event in events[:first] if isinstance(event, ProvisionalToken)]
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_new_tokens == len(tokens)
    outcomes = [token.confirms_provisional for token in tokens]
    if not found:
        assert set(outcomes) == {None}
        assert end.timings.provisional_token_s is None
        return None
    assert outcomes == [found[0].token_id == tokens[0].token_id, *[None] * (len(tokens) - 1)]
    assert end.timings.provisional_token_s is not None
    assert 0 < end.timings.provisional_token_s <= end.timings.first_token_s
    return found[0]


def bare(events: list[Event]) -> list[Event]:
    """The answer alone."""
    left = [event for event in events if not isinstance(event, ProvisionalToken)]
    return [replace(event, confirms_provisional=None) if isinstance(event, Token) else event for event in left]


@pytest.mark.parametrize("attention", ["dense", "sparse"])
async def test_it_is_chain_1s_own_and_the_answer_is_the_one_without(
    checkpoint: Checkpoint, tokenizer: Tokenizer, attention: str
) -> None:
    """The second time the prefill node has kept the whole prompt, and reads its last token alone."""
    plainly = ASKED | {"provisional_first_token": False}
    async with cluster(checkpoint, tokenizer, keeps_bytes=16 << 20) as (address, (node,)):
        plain = await ask(address, token_ids=LONG, attention=attention, **plainly)
        told = [await ask(address, token_ids=LONG, attention=attention, **ASKED) for _ in range(2)]
    assert provisional_of(plain) is None
    for events in told:
        assert_same_answer(bare(events), plain)
        found = provisional_of(events)
        assert found is not None
        assert_greedy(checkpoint.load(1), LONG, [found.token_id], 1)
        assert found.text == tokenizer.decode([found.token_id])
    end = told[1][-1]
    assert isinstance(end, Finished)
    assert end.usage.num_prefill_cached_tokens == (len(LONG) - 1 if attention == "dense" else 0)
    outcomes = node.owner.provisional
    assert (sum(outcomes.values()), outcomes[ProvisionalOutcome.LATE]) == (2, 0)


NOTHING: dict[str, dict[str, Any]] = {
    "not asked for": {"provisional_first_token": False},
    "one chain": {"num_chains": 1},
    "a prompt that the decode node reads": {"token_ids": SHORT},
    "a grammar": {"sampling": SamplingParams(constraint=Constraint(kind="regex", text="[a-z]+"), min_tokens=2)},
}


async def test_where_it_would_be_no_sooner_none_is_asked_for(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    async with cluster(checkpoint, tokenizer) as (address, (node,)):
        for options in NOTHING.values():
            assert provisional_of(await ask(address, **{"token_ids": LONG} | ASKED | options)) is None
    assert not node.owner.provisional


async def test_a_prompt_that_was_found_has_none_and_one_that_differs_in_its_last_token_not_the_others(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    """Answers to one prompt that come together have one prefill: the one that began it is told."""
    async with cluster(checkpoint, tokenizer, prefix_cache_bytes=16 << 20) as (address, (node,)):
        await ask(address, token_ids=list(range(70, 140)), **ASKED)  # the node learns what a tile is
        together = await asyncio.gather(*(ask(address, token_ids=ids, **ASKED) for ids in (LONG, LONG, OTHER)))
        found = [provisional_of(events) for events in together]
        assert provisional_of(await ask(address, token_ids=OTHER, **ASKED)) is None
    (one,) = [number for number, each in enumerate(found) if each is not None]
    told = found[one]
    assert told is not None
    assert_greedy(checkpoint.load(1), (LONG, LONG, OTHER)[one], [told.token_id], 1)
    assert sum(node.owner.provisional.values()) == 2


async def test_after_a_lost_decode_node_there_is_still_one_and_the_next_nodes_first_token_judges_it(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    async with cluster(checkpoint, tokenizer, num_nodes=2) as (address, nodes):
        lost: list[DecodeEngine] = []

        def is_first(engine: DecodeEngine, _: object) -> bool:
            lost.append(engine)
            return len(lost) == 1

        with gate_before(DecodeEngine, "step", is_first) as gate:
            asking = asyncio.create_task(ask(address, token_ids=LONG, **ASKED))
            await gate.until_reached()
            (node,) = (node for node in nodes if node.owner._loop._engine is lost[0])
            await node._server.stop(0)
            events = await asking
        plain = await ask(address, token_ids=LONG, **ASKED)
    assert provisional_of(events) is not None
    assert_same_answer(bare(events), bare(plain))
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_decode_nodes == 2


def test_an_answer_that_goes_on_asks_for_none() -> None:
    def wants(*made_token_ids: int) -> bool:
        return DecodeJob(
            request_id="r",
            token_ids=np.array(LONG),
            scale=Changing(Scale(num_chains=3, min_chains=1)),
            max_new_tokens=5,
            sampling=ENDLESS,
            deadline=None,
            provisional_first_token=True,
            made_token_ids=made_token_ids,
        ).wants_provisional

    assert (wants(), wants(9, 8)) == (True, False)
