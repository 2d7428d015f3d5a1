"""A deadline that passes while something still writes for the request: nobody else's pages are touched."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import grpc
import numpy as np
import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.events import Event
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from decode_node.engine import DecodeEngine
from decode_node.kv_store import KvStore
from decode_node.node import DecodeNode
from decode_node.requests import DecodeJob
from prefill_node.engine import PrefillEngine
from prefill_node.node import PrefillNode
from prefill_node.prefill_run import PrefillRun
from tests.gates import LIMIT_S, Gate, gate_before
from tests.nodes import Answer, decode, decode_node, pages_bytes, prefill_node, until_idle
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def nodes(checkpoint: Checkpoint) -> AsyncIterator[tuple[PrefillNode, DecodeNode]]:
    path = str(checkpoint.path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        yield prefill, node


WRITERS = {"a decode step": (DecodeEngine, "step"), "a receiving thread": (KvStore, "write_payload")}


async def cancelled_twice_at(gate: Gate, node: DecodeNode) -> None:
    """Run a request up to the gate, then cancel it twice, as gRPC's deadline and our own do."""
    job = DecodeJob(
        request_id="late",
        token_ids=np.array(PROMPT[::-1]),
        scale=Changing(Scale(num_chains=3, min_chains=3)),
        max_new_tokens=8,
        sampling=SamplingParams(ignore_eos=True),
        deadline=None,
    )

    async def emit(_: Event) -> None:
        pass

    late = asyncio.create_task(node.owner.run(job, emit))
    await gate.until_reached()
    while not late.done():
        late.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
    assert late.cancelled()
    assert not node.owner.stages()


@pytest.mark.parametrize("writer", WRITERS)
async def test_pages_stay_held_while_something_writes_into_them(
    nodes: tuple[PrefillNode, DecodeNode], writer: str
) -> None:
    """Bug: gRPC's deadline and our own both cancelled; the second cut the wait short and freed the pages."""
    _, node = nodes
    with gate_before(*WRITERS[writer]) as gate:
        await cancelled_twice_at(gate, node)
        assert node.page_line.pool.num_used > 0
        gate.open()
        await until_idle(node)


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_neighbour_gets_the_pages_of_a_late_request_only_after_the_last_write(
    checkpoint: Checkpoint, writer: str
) -> None:
    """Bug: the late request overwrote the neighbour's keys and values: wrong logprobs, and no error."""
    path, kv_cache_bytes = str(checkpoint.path), pages_bytes(checkpoint.config, 10)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], kv_cache_bytes=kv_cache_bytes) as node,
    ):
        undisturbed = await decode(node.address, PROMPT, num_chains=3)
        with gate_before(*WRITERS[writer]) as gate:
            await cancelled_twice_at(gate, node)
            neighbour = asyncio.create_task(decode(node.address, PROMPT, request_id="neighbour", num_chains=3))
            async with asyncio.timeout(LIMIT_S):
                while not node.page_line.num_waiting:
                    await asyncio.sleep(0.01)
            gate.open()
            answer = await neighbour
    assert answer.token_ids == undisturbed.token_ids
    assert answer.logprobs == pytest.approx(undisturbed.logprobs, abs=1e-4)


async def test_the_engine_serves_the_next_stream_only_after_the_late_ones_thread_has_ended(
    nodes: tuple[PrefillNode, DecodeNode],
) -> None:
    prefill, node = nodes

    def is_late(_: PrefillEngine, runs: Sequence[PrefillRun]) -> bool:
        return any(run.num_tokens == len(PROMPT) - 1 for run in runs)

    with gate_before(PrefillEngine, "step", is_late) as gate:
        await cancelled_twice_at(gate, node)
        assert prefill.service.load.num_active == 1
        next_one = asyncio.create_task(decode(node.address, PROMPT[:100], request_id="next"))
        async with asyncio.timeout(LIMIT_S):
            while not prefill.service.load.num_queued:
                await asyncio.sleep(0.01)
        gate.open()
        assert len((await next_one).token_ids) == 8


def slowly(original: Callable[..., object], pause_s: float, *args: object, **kwargs: object) -> object:
    time.sleep(random.random() * pause_s)
    return original(*args, **kwargs)


async def test_random_deadlines_never_change_an_answer_that_completes(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 requests with deadlines from 0 to twice their duration share few pages with as many without deadlines."""
    draw = random.Random(0)
    path = str(checkpoint.path)
    prompts = [PROMPT[start : start + draw.randint(2, 90)] for start in range(8)]
    kv_cache_bytes = pages_bytes(checkpoint.config, 6 * 7)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], kv_cache_bytes=kv_cache_bytes, max_batch_size=4) as node,
    ):
        undisturbed = [await decode(node.address, prompt, num_chains=3) for prompt in prompts]
        step, write = DecodeEngine.step, KvStore.write_payload
        monkeypatch.setattr(DecodeEngine, "step", lambda *args: slowly(step, 0.01, *args))
        monkeypatch.setattr(KvStore, "write_payload", lambda *args, **more: slowly(write, 0.01, *args, **more))
        started_s = time.monotonic()
        await asyncio.gather(*(decode(node.address, prompts[0], request_id=f"warm {i}") for i in range(8)))
        duration_s = time.monotonic() - started_s
        num_completed = num_late = 0
        places = asyncio.Semaphore(12)

        async def ask(number: int) -> Answer | grpc.aio.AioRpcError:
            timeout_s = draw.uniform(0, 2 * duration_s) if number % 2 else None
            prompt = prompts[number % len(prompts)]
            call = partial(decode, node.address, prompt, request_id=str(number), num_chains=3)
            async with places:
                try:
                    return await call(timeout_s=timeout_s)
                except grpc.aio.AioRpcError as err:
                    return err

        answers = await asyncio.gather(*map(ask, range(400)))
        await until_idle(node)
    for number, answer in enumerate(answers):
        if isinstance(answer, grpc.aio.AioRpcError):
            assert number % 2
            assert answer.code() == grpc.StatusCode.DEADLINE_EXCEEDED, answer
            num_late += 1
            continue
        num_completed += 1
        expected = undisturbed[number % len(prompts)]
        assert answer.token_ids == expected.token_ids
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert num_completed >= 200
    assert num_late > 0
