"""The decode loop: an answer that fails, fails alone, and no caller waits for a loop that has ended."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from colm.checkpoint import Checkpoint
from decode_node.engine import DecodeEngine, StepInput
from decode_node.node import DecodeNode
from decode_node.running_answer import RunningAnswer
from tests.gates import gate_before
from tests.nodes import decode, decode_node, prefill_node, until_idle
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def node(checkpoint: Checkpoint) -> AsyncIterator[DecodeNode]:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address], max_batch_size=3) as node:
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

    def fail_one(answer: RunningAnswer, choice: Any) -> Any:
        if answer.num_new_tokens == 2 and answer._num_chains == 2:
            raise ValueError("a character that is none")
        return advance(answer, choice)

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

    def fail_with_two(engine: DecodeEngine, inputs: Sequence[StepInput]) -> Tensor:
        sizes.append(len(inputs))
        if len(inputs) == 2:
            raise RuntimeError("the machine is ill")
        return step(engine, inputs)

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

        def counted(engine: DecodeEngine, inputs: Sequence[StepInput]) -> Tensor:
            sizes.append(len(inputs))
            result: Tensor = gated(engine, inputs)
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
