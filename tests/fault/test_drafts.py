"""Answers that draft on a real node: the same answers, nothing held when they leave in mid-draft, and honest counts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import torch
from colm_kernels import native

from colm.checkpoint import Checkpoint, save
from colm.client import AsyncClient
from colm.events import Finished, Usage
from colm.sampling import SamplingParams
from decode_node.drafter import Drafter
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from decode_node.plan import StepPlan
from tests.gates import gate_before
from tests.gateway import TakingTurns, gateway
from tests.nodes import Answer, decode, decode_node, until_idle
from tests.tiny import random_tensors, tiny_config

NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there, and short prompts need nobody."""
PROMPT = (20, 9, 300, 41)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Later chains change what chain 1 chooses here and there."""
    config = tiny_config(hidden_dim=8 * 32)  # in whole groups, so that quantised weights draft
    tensors = random_tensors(config)
    for name, tensor in tensors.items():
        if name.startswith("head.") and name != "head.chain1":
            tensor *= 0.3
    return save(tmp_path_factory.mktemp("model") / "tiny", config, tensors)


@pytest.fixture
async def node(checkpoint: Checkpoint) -> AsyncIterator[DecodeNode]:
    async with decode_node(str(checkpoint.path), [NOBODY], max_batch_size=2) as node:
        yield node


@pytest.fixture(autouse=True)
def three_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever steps take here, three tokens are drafted, or fewer if the request says so."""

    def num_drafts(drafter: Drafter, num_answers: int) -> int:
        return min(3, drafter._max_draft_tokens, 16 // num_answers - 1)

    monkeypatch.setattr(Drafter, "num_drafts", num_drafts)


def is_draft(_: DecodeEngine, plan: StepPlan) -> bool:
    """Whether a step drafts: one token, of a text that a step of chain 1 alone would not read."""
    return plan.rows[0].num_chains == 1


def tokens(answer: Answer) -> list[Any]:
    return [response.token for response in answer.responses if response.WhichOneof("event") == "token"]


GREEDY = SamplingParams(ignore_eos=True, top_logprobs=2)
PENALISED = SamplingParams(
    ignore_eos=True,
    temperature=0.7,
    seed=5,
    frequency_penalty=0.6,
    presence_penalty=0.3,
    repetition_penalty=1.2,
    min_p=0.01,
    logit_bias=((20, 2.0),),
    min_tokens=9,
)
DRAWN = SamplingParams(ignore_eos=True, temperature=0.5, top_p=0.95, seed=5, top_logprobs=1)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])
async def test_drafts_change_no_token_and_no_logprob_and_are_counted(
    node: DecodeNode, sampling: SamplingParams
) -> None:
    asks: list[dict[str, Any]] = [
        {"num_chains": num_chains, "max_new_tokens": 30, "sampling": sampling} for num_chains in (3, 2, 1, 3)
    ]
    plain = [await decode(node.address, PROMPT, max_draft_tokens=0, **ask) for ask in asks]
    assert all(answer.usage.num_draft_tokens == 0 for answer in plain)
    assert node.owner._loop.counts.num_draft_tokens == 0
    drafted = await asyncio.gather(
        *(decode(node.address, PROMPT, request_id=str(number), **ask) for number, ask in enumerate(asks))
    )
    assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in plain]
    if native.default_variant(torch.float32) != "torch":  # whose bits depend on the rows beside
        assert [tokens(answer) for answer in drafted] == [tokens(answer) for answer in plain]
    usages = [answer.usage for answer in drafted]
    assert usages[2].num_draft_tokens == 0
    for usage in (usages[0], usages[1], usages[3]):
        assert usage.num_accepted_tokens < usage.num_draft_tokens
    # Which tokens are drafted depends on when the others come, so one answer alone may have all of its drafts refused.
    assert sum(usage.num_accepted_tokens for usage in usages) > 0
    for counted, name in (("draft", "num_draft_tokens"), ("accepted", "num_accepted_tokens")):
        found = node.metrics.get_sample_value(f"colm_decode_{counted}_tokens_total")
        assert found == sum(getattr(usage, name) for usage in usages)


async def test_a_request_may_ask_for_fewer_drafts_and_not_for_more_than_the_node_allows(
    checkpoint: Checkpoint, node: DecodeNode
) -> None:
    one = await decode(node.address, PROMPT, num_chains=3, max_new_tokens=30, max_draft_tokens=1)
    rounds_of_one = one.usage.num_new_tokens - one.usage.num_accepted_tokens
    assert 0 < one.usage.num_draft_tokens < rounds_of_one
    async with decode_node(str(checkpoint.path), [NOBODY], max_draft_tokens=0) as off:
        answer = await decode(off.address, PROMPT, num_chains=3, max_new_tokens=30, max_draft_tokens=9)
    assert answer.usage.num_draft_tokens == 0
    assert answer.token_ids == one.token_ids


async def test_what_a_client_asks_for_goes_through_the_gateway(checkpoint: Checkpoint, node: DecodeNode) -> None:
    async with gateway(checkpoint.config, TakingTurns([node.address])) as address, AsyncClient(address) as client:

        async def usage(max_draft_tokens: int | None) -> Usage:
            answer = client.generate(token_ids=PROMPT, max_new_tokens=30, max_draft_tokens=max_draft_tokens)
            *_, finished = [event async for event in answer]
            assert isinstance(finished, Finished)
            return finished.usage

        free, one, none = [await usage(asked) for asked in (None, 1, 0)]
    assert free.num_draft_tokens > one.num_draft_tokens > 0
    assert free.num_accepted_tokens > 0
    assert none.num_draft_tokens == none.num_accepted_tokens == 0


async def test_an_answer_that_leaves_in_mid_draft_leaves_its_neighbour_alone_and_holds_nothing(
    node: DecodeNode,
) -> None:
    ask: dict[str, Any] = {"num_chains": 3, "max_new_tokens": 40}
    plain = await decode(node.address, PROMPT, **ask)
    with gate_before(DecodeEngine, "step", is_draft) as gate:
        leaving = asyncio.create_task(decode(node.address, PROMPT, request_id="leaving", num_chains=3))
        await gate.until_reached()
        neighbour = asyncio.create_task(decode(node.address, PROMPT, request_id="neighbour", **ask))
        leaving.cancel()
        await asyncio.wait([leaving])
        gate.open()
        assert (await neighbour).token_ids == plain.token_ids
    await until_idle(node)


async def test_drafts_stop_for_whoever_comes_and_else_follow_each_other(
    node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_drafts, step = list[bool](), DecodeEngine.step

    def spied(engine: DecodeEngine, plan: StepPlan) -> torch.Tensor:
        only_drafts.append(plan.only_drafts)
        return step(engine, plan)

    monkeypatch.setattr(DecodeEngine, "step", spied)
    ask: dict[str, Any] = {"num_chains": 3, "max_new_tokens": 12}
    first = asyncio.create_task(decode(node.address, PROMPT, request_id="first", **ask))
    with gate_before(DecodeEngine, "step", is_draft) as gate:
        await gate.until_reached()
        second = asyncio.create_task(decode(node.address, PROMPT, request_id="second", **ask))
        while node.owner._loop._scheduler.num_waiting == 0:
            await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(first, second)
    assert only_drafts[:3] == [False, True, False], "the first's prompt, one draft, the newcomer's prompt"
    assert any(only_drafts[at : at + 3] == [True] * 3 for at in range(len(only_drafts)))
    assert node.owner._loop.counts.num_steps == len(only_drafts)


async def test_a_deadline_in_mid_draft_ends_the_call_and_frees_the_pages(node: DecodeNode) -> None:
    with gate_before(DecodeEngine, "step", is_draft) as gate:
        call = asyncio.create_task(decode(node.address, PROMPT, num_chains=3, timeout_s=0.5))
        await gate.until_reached()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert node.page_line.pool.num_used, "the step writes into them"
        gate.open()
        await until_idle(node)
