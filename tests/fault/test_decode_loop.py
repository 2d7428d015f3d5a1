"""The decode loop: an answer that fails, fails alone, and no caller waits for a loop that has ended."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from colm import defaults
from colm.checkpoint import Checkpoint
from colm.events import Token
from colm.watch import Watch
from colm.wire.v1 import common_pb2
from decode_node import decode_loop as loop_module
from decode_node.engine import DecodeEngine
from decode_node.node import DecodeNode
from decode_node.plan import PlanRow, StepPlan
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice
from decode_node.step_budget import StepBudget
from tests.clock import FakeClock
from tests.gates import gate_before
from tests.nodes import decode, decode_node, prefill_node, until_idle
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def node(checkpoint: Checkpoint) -> AsyncIterator[DecodeNode]:
    """Its answers advance by one token a step."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], max_batch_size=3, max_draft_tokens=0) as node,
    ):
        yield node


async def code_of(call: "asyncio.Task[Any]") -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    code: grpc.StatusCode = caught.value.code()
    return code


def ask(node: DecodeNode, request_id: str, **request: Any) -> "asyncio.Task[Any]":
    return asyncio.create_task(decode(node.address, PROMPT, request_id=request_id, **request))


async def test_an_answer_that_cannot_be_advanced_ends_alone(node: DecodeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the caller of such an answer hung, and its pages and its neighbours' were held for ever."""
    undisturbed = await ask(node, "before")
    advance = RunningAnswer.advance

    def fail_one(answer: RunningAnswer, choices: Any) -> Any:
        if answer.num_new_tokens == 2 and answer.num_chains == 2:
            raise ValueError("a character that is none")
        return advance(answer, choices)

    monkeypatch.setattr(RunningAnswer, "advance", fail_one)
    neighbour, failing = ask(node, "neighbour"), ask(node, "failing", num_chains=2)
    assert await code_of(failing) == grpc.StatusCode.INTERNAL
    assert (await neighbour).token_ids == undisturbed.token_ids
    assert node.is_healthy


async def test_a_failed_step_is_told_to_everybody_in_it_and_the_next_request_is_served(
    node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DecodeEngine.step
    sizes: list[int] = []

    def fail_with_two(engine: DecodeEngine, plan: StepPlan) -> Tensor:
        sizes.append(len(plan.rows))
        if len(plan.rows) == 2:
            raise RuntimeError("the machine is ill")
        return step(engine, plan)

    monkeypatch.setattr(DecodeEngine, "step", fail_with_two)
    calls = [ask(node, str(number), max_new_tokens=400) for number in range(2)]
    assert [await code_of(call) for call in calls] == [grpc.StatusCode.INTERNAL] * 2
    assert sizes.count(2) == 1
    assert len((await ask(node, "next")).token_ids) == 8


async def test_answers_share_steps_and_never_more_than_the_batch_holds(
    node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = await ask(node, "alone")
    sizes: list[int] = []
    with gate_before(DecodeEngine, "step") as gate:
        gated = DecodeEngine.step

        def counted(engine: DecodeEngine, plan: StepPlan) -> Tensor:
            sizes.append(len(plan.rows))
            result: Tensor = gated(engine, plan)
            return result

        monkeypatch.setattr(DecodeEngine, "step", counted)
        calls = [ask(node, str(number)) for number in range(7)]
        async with asyncio.timeout(60):
            while node.load.num_active < 7:
                await asyncio.sleep(0.01)
        gate.open()
        answers = await asyncio.gather(*calls)
        monkeypatch.undo()
    assert {answer.token_ids for answer in answers} == {alone.token_ids}
    assert max(sizes) == 3
    # The first may step before its neighbours have come.
    assert len(sizes) <= 8 + 8 + 8 + 8


async def test_rows_of_several_tokens_share_steps_with_ordinary_ones(
    node: DecodeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At scale 2 an answer reads its last token but one again, as a draft that turns out right, and asks for both."""
    requests = [{"num_chains": num_chains} for num_chains in (3, 2, 1)]
    undisturbed = [await ask(node, f"before{number}", **request) for number, request in enumerate(requests)]
    next_rows, advance = RunningAnswer.next_rows, RunningAnswer.advance
    last_read: dict[RunningAnswer, int] = {}
    num_read_again = 0

    def read_again(answer: RunningAnswer, max_tokens: int) -> list[PlanRow]:
        (row,), before = next_rows(answer, max_tokens), last_read.get(answer)
        (last_read[answer],) = row.token_ids
        if before is None or row.num_chains != 2:
            return [row]
        return [replace(row, token_ids=(before, *row.token_ids), position=row.position - 1, num_logits=2)]

    def advance_by_the_last(answer: RunningAnswer, choices: Sequence[Choice]) -> list[Token]:
        nonlocal num_read_again
        if len(choices) == 2:
            assert choices[0].token_id == last_read[answer]
            num_read_again += 1
        return advance(answer, choices[-1:])

    monkeypatch.setattr(RunningAnswer, "next_rows", read_again)
    monkeypatch.setattr(RunningAnswer, "advance", advance_by_the_last)
    calls = [ask(node, f"after{number}", **request) for number, request in enumerate(requests)]
    answers = await asyncio.gather(*calls)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in undisturbed]
    assert num_read_again == len(answers[1].token_ids) - 1


NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there."""


@pytest.mark.parametrize("num_chains", [1, 3])
async def test_a_short_prompt_is_answered_where_no_prefill_node_is_and_as_if_there_were_one(
    checkpoint: Checkpoint, num_chains: int
) -> None:
    path, prompt = str(checkpoint.path), PROMPT[:20]
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address], max_local_prefill_tokens=0) as node:
        prefilled = await decode(node.address, prompt, num_chains=num_chains)
    async with decode_node(path, [NOBODY], max_local_prefill_tokens=len(prompt)) as node:
        answer = await decode(node.address, prompt, num_chains=num_chains)
    assert answer.token_ids == prefilled.token_ids
    assert (prefilled.usage.num_prefill_tokens, prefilled.usage.num_decode_prompt_tokens) == (19, 1)
    usage = answer.usage
    assert (usage.num_prefill_tokens, usage.num_decode_prompt_tokens, usage.num_kv_streams) == (0, 20, 0)
    assert usage.kv_received_bytes == 0
    assert answer.timings.prefill_s == 0


async def test_short_prompts_that_come_together_are_each_answered_as_if_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of their tokens than one step may read; the answers that go on meanwhile share its steps."""
    prompts = [PROMPT[start : start + 20] for start in range(0, 20, 3)]
    async with decode_node(str(checkpoint.path), [NOBODY], max_batch_size=9) as node:
        alone = [await decode(node.address, prompt, num_chains=1 + i % 3) for i, prompt in enumerate(prompts)]
        most = 0
        with gate_before(DecodeEngine, "step") as gate:
            gated = DecodeEngine.step

            def counted(engine: DecodeEngine, plan: StepPlan) -> Tensor:
                nonlocal most
                most = max(most, sum(len(row.token_ids) for row in plan.rows))
                result: Tensor = gated(engine, plan)
                return result

            monkeypatch.setattr(DecodeEngine, "step", counted)
            calls = [
                asyncio.create_task(decode(node.address, prompt, request_id=str(i), num_chains=1 + i % 3))
                for i, prompt in enumerate(prompts)
            ]
            async with asyncio.timeout(60):
                while node.load.num_active < len(prompts):
                    await asyncio.sleep(0.01)
            gate.open()
            answers = await asyncio.gather(*calls)
            monkeypatch.undo()
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    budget = StepBudget(step_tokens=64, max_tokens=64)
    assert budget.tokens(0) <= most <= budget.tokens(len(prompts)), "who goes on first is not said"


async def test_a_long_prompt_is_read_in_pieces_between_the_steps_of_an_answer_that_goes_on(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a prompt was read in one step, for which every answer waited, however long it was."""
    path, prompt = str(checkpoint.path), PROMPT * 4
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        prefilled = await decode(node.address, prompt)
    sizes: list[dict[int, int]] = []
    step = DecodeEngine.step

    def noted(engine: DecodeEngine, plan: StepPlan) -> Tensor:
        sizes.append(Counter(table_id for row in plan.rows for table_id in [id(row.table_M)] * len(row.token_ids)))
        result: Tensor = step(engine, plan)
        return result

    monkeypatch.setattr(loop_module, "BEAT_INTERVAL_S", 0.0)
    async with decode_node(
        path, [NOBODY], max_local_prefill_tokens=len(prompt), step_tokens=12, max_draft_tokens=0
    ) as node:
        monkeypatch.setattr(DecodeEngine, "step", noted)
        with gate_before(DecodeEngine, "step") as gate:
            talker = asyncio.create_task(decode(node.address, PROMPT[:5], request_id="talker", max_new_tokens=40))
            await gate.until_reached()
            reader = asyncio.create_task(decode(node.address, prompt))
            async with asyncio.timeout(60):
                while node.load.num_active < 2:
                    await asyncio.sleep(0.01)
            gate.open()
            answer, other = await reader, await talker
    assert answer.token_ids == prefilled.token_ids
    assert (answer.usage.num_prefill_tokens, answer.usage.num_decode_prompt_tokens) == (0, 160)
    # Eleven tokens of the prompt in each step, beside the one of the answer that goes on.
    assert [sorted(each.values()) for each in sizes[1:15]] == [[1, 11]] * 14
    assert len(other.token_ids) == 40
    told = [each.prefill_progress for each in answer.responses if each.WhichOneof("event") == "prefill_progress"]
    assert {each.num_tokens_total for each in told} == {160}
    done = [each.num_tokens_done for each in told]
    assert done == sorted(done)
    assert done[-1] > 0


async def test_a_kept_prompt_waits_for_no_more_than_the_step_that_runs_beside_a_long_one(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, long, kept = str(checkpoint.path), PROMPT * 4, PROMPT * 5
    sizes: list[list[int]] = []
    async with (
        prefill_node(path) as prefill,
        decode_node(
            path, [prefill.address], max_local_prefill_tokens=len(long), prefix_cache_bytes=4 << 20, step_tokens=12
        ) as node,
    ):
        # The node learns from the first stream what a prefill node's tiles are, and keeps what the second brings.
        for _ in range(2):
            first = await decode(node.address, kept, request_id="first")
        with gate_before(DecodeEngine, "step") as gate:
            gated = DecodeEngine.step

            def noted(engine: DecodeEngine, plan: StepPlan) -> Tensor:
                sizes.append([len(row.token_ids) for row in plan.rows if row.num_logits])
                result: Tensor = gated(engine, plan)
                return result

            monkeypatch.setattr(DecodeEngine, "step", noted)
            reader = asyncio.create_task(decode(node.address, long, request_id="long"))
            await gate.until_reached()
            again = asyncio.create_task(decode(node.address, kept, request_id="again"))
            async with asyncio.timeout(60):
                while node.load.num_active < 2:
                    await asyncio.sleep(0.01)
            gate.open()
            answer = await again
            await reader
            monkeypatch.undo()
    assert (answer.token_ids, answer.usage.num_prefill_tokens) == (first.token_ids, 0)
    # No token of the long one in the first step, and in the second the kept one's.
    assert sizes[:2] == [[], [1]]


async def test_a_node_measures_its_budget_unless_an_option_says_it(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for step_tokens in (None, 7):
        caplog.clear()
        async with decode_node(str(checkpoint.path), [NOBODY], step_tokens=step_tokens) as node:
            shown = node.metrics.get_sample_value("colm_decode_step_budget_tokens")
        assert (step_tokens is None) == ("decode.measured step_tokens=" in caplog.text)
        assert f" step_tokens={shown:.0f} " in caplog.text
        assert shown == step_tokens if step_tokens else 8 <= shown <= 64


async def test_a_node_knows_what_drafts_take_before_its_first_answer_and_measures_none_where_nobody_drafts(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with decode_node(str(checkpoint.path), [NOBODY], step_tokens=None) as node:
        assert node.owner._drafting is not None
        assert len(node.owner._drafting.times.rounds(1)) > 1
    assert "draft_ms=" in caplog.text
    assert "draft_ms=none" not in caplog.text
    caplog.clear()
    async with decode_node(str(checkpoint.path), [NOBODY], step_tokens=None, max_draft_tokens=0) as node:
        assert node.owner._drafting is None
    assert "draft_ms=none" in caplog.text


async def test_a_longer_prompt_and_one_that_asks_for_sparse_attention_go_to_a_prefill_node(node: DecodeNode) -> None:
    limit = defaults.MAX_LOCAL_PREFILL_TOKENS
    longer = await decode(node.address, PROMPT[: limit + 1])
    assert (longer.usage.num_prefill_tokens, longer.usage.num_kv_streams) == (limit, 1)
    sparse = await decode(node.address, PROMPT[:limit], attention=common_pb2.ATTENTION_MODE_SPARSE)
    assert (sparse.usage.num_prefill_tokens, sparse.usage.num_kv_streams) == (limit - 1, 1)
    assert (await decode(node.address, PROMPT[:limit])).usage.num_kv_streams == 0


class Fatal(BaseException):
    """A BaseException, which must end the loop."""


async def test_a_loop_that_dies_tells_everybody_and_its_node_is_ill(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(checkpoint.path)

    def die(*_: Any) -> Tensor:
        raise Fatal

    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        assert node.is_healthy
        monkeypatch.setattr(DecodeEngine, "step", die)
        calls = [ask(node, str(number)) for number in range(3)]
        codes = [await code_of(call) for call in calls]
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
        assert not node.is_healthy
        assert await code_of(ask(node, "later")) == grpc.StatusCode.UNAVAILABLE
        await until_idle(node)


async def test_a_node_that_stops_ends_its_answers_and_holds_nothing(checkpoint: Checkpoint) -> None:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        with gate_before(DecodeEngine, "step") as gate:
            call = ask(node, "running")
            await gate.until_reached()
            assert node._loop_task is not None
            node._loop_task.cancel()
            gate.open()
            assert await code_of(call) == grpc.StatusCode.UNAVAILABLE


async def test_a_step_that_does_not_end_makes_its_node_ill(node: DecodeNode) -> None:
    clock = FakeClock()
    node._watch = Watch(clock, node._watch._mark)

    def looks(times: int) -> list[bool]:
        said = []
        for _ in range(times):
            clock.now_s += 1
            said.append(node.is_healthy)
        return said

    assert all(looks(100))
    with gate_before(DecodeEngine, "step") as gate:
        call = ask(node, "stuck")
        await gate.until_reached()
        assert looks(61)[-2:] == [True, False]
        gate.open()
        await call
    assert all(looks(100))
    await until_idle(node)
