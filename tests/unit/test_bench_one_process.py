"""The benchmark of serving: the reference, one process that does both."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from bench.serving.check import check_greedy
from bench.serving.one_process import OneProcess, serving
from cluster.front_door.placement import DecodeJob, DecodeLease
from colm.checkpoint import Checkpoint
from colm.client import Client, collect
from colm.clock import Deadline, MonotonicClock
from colm.errors import InvalidRequest
from colm.kv import KvFormat
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from colm.wire.security import Security
from tests.one_process import assert_idle, config_of
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("serving") / "tiny", tokenizer=True)


async def test_one_process_answers_as_the_model_does_whatever_else_it_answers(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 270, length) for length in (1, 2, 31, 32, 33, 100)]
    greedy = SamplingParams(ignore_eos=True)

    def ask(address: str, number: int) -> list[int]:
        with Client(address) as client:
            found = collect(client.generate(token_ids=prompts[number], max_new_tokens=6, sampling=greedy))
        assert found.finished.usage.num_prompt_tokens == len(prompts[number])
        assert found.finished.timings.queue_s >= 0
        return [each.token_id for each in found.tokens]

    async with serving(checkpoint.path, config_of(checkpoint), Security()) as (address, engine):
        answers = await asyncio.gather(*(asyncio.to_thread(ask, address, number) for number in range(len(prompts))))
        assert_idle(engine)
    for prompt_T, answer_T in zip(prompts, answers, strict=True):
        check_greedy(checkpoint, torch.float32, prompt_T, answer_T)
    wrong_T = [(token_id + 1) % 270 for token_id in answers[-1]]
    with pytest.raises(AssertionError, match="was chosen, but"):
        check_greedy(checkpoint, torch.float32, prompts[-1], wrong_T)


def job(num_prompt_tokens: int, max_new_tokens: int) -> DecodeJob:
    return DecodeJob(
        request_id=str(num_prompt_tokens),
        token_ids=np.arange(3, 3 + num_prompt_tokens),
        scale=Changing(Scale(num_chains=1, min_chains=1)),
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(ignore_eos=True),
        attention="dense",
        kv_codec="raw",
        max_draft_tokens=None,
    )


async def all_at_once(engine: OneProcess, jobs: Sequence[DecodeJob]) -> tuple[list[str], list[Any]]:
    """Have jobs wait before the first is begun; returns the owners of all events as made, and the jobs' own times."""
    lease, deadline = DecodeLease(address="", lease_id=""), Deadline.after(MonotonicClock(), 60)
    owners: list[str] = []

    async def ask(each: DecodeJob) -> None:
        async for _ in engine.decode(lease, each, only_if_room=False, deadline=deadline):
            pass

    def noting(work: Any, emit: Callable[[Any], None]) -> Callable[[Any], None]:
        def note(event: Any) -> None:
            owners.append(work.job.request_id)
            emit(event)

        return note

    with engine._changed:
        tasks = [asyncio.create_task(ask(each)) for each in jobs]
        while len(engine._waiting) < len(jobs):
            await asyncio.sleep(0)
        works = list(engine._waiting)
        for work in works:
            work.emit = noting(work, work.emit)
    await asyncio.gather(*tasks)
    return owners, works


@pytest.fixture
def one_process(checkpoint: Checkpoint) -> Iterator[Callable[..., OneProcess]]:
    made: list[OneProcess] = []

    def make(**options: Any) -> OneProcess:
        kv_format = KvFormat.of(checkpoint.config, torch.float32)
        made.append(OneProcess(checkpoint, kv_format, config_of(checkpoint, **options)))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
        assert_idle(engine)


async def test_one_process_takes_prompts_in_the_order_in_which_they_came(
    one_process: Callable[..., OneProcess],
) -> None:
    """One answer at a time: the shortest, which came last, is last."""
    owners, _ = await all_at_once(
        one_process(**{"decode.max_batch_size": 1}), [job(99, 3), job(60, 2), job(30, 2), job(2, 1)]
    )
    # The last event of each is the end.
    assert owners == 4 * ["99"] + 3 * ["60"] + 3 * ["30"] + 2 * ["2"]


async def test_every_prompt_that_waits_goes_before_the_answers_and_has_its_first_token_before_the_next(
    one_process: Callable[..., OneProcess],
) -> None:
    owners, works = await all_at_once(one_process(), [job(40, 3), job(30, 3), job(2, 3)])
    # The last event of each is the end.
    assert owners == ["40", "30", "2"] * 2 + ["40", "40", "30", "30", "2", "2"]
    for earlier, later in pairwise(works):
        assert earlier.started_s < earlier.first_token_s <= later.started_s


async def test_who_leaves_frees_pages_for_who_waits_in_order_of_arrival(checkpoint: Checkpoint) -> None:
    """The cache holds one long answer: the second starts when the first is cancelled, the third after it."""
    layout_bytes = 64 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, kv heads, head dim, float32
    config = config_of(checkpoint, **{"decode.kv_cache_bytes": layout_bytes})
    async with serving(checkpoint.path, config, Security()) as (address, engine):
        assert engine.pool.num_pages == 4
        with Client(address) as client:
            greedy = SamplingParams(ignore_eos=True)
            first = client.generate(token_ids=range(3, 10), max_new_tokens=50, sampling=greedy)
            await asyncio.to_thread(next, first)
            later = [asyncio.to_thread(ask_for, address, 50) for _ in range(2)]
            tasks = [asyncio.create_task(each) for each in later]
            first.close()
            ends = await asyncio.gather(*tasks)
            assert ends == [50, 50]
            with pytest.raises(InvalidRequest, match="needs 5 KV pages with its prompt, and there are 4"):
                await asyncio.to_thread(ask_for, address, 60)
        assert_idle(engine)


def ask_for(address: str, num_tokens: int) -> int:
    with Client(address) as client:
        greedy = SamplingParams(ignore_eos=True)
        return len(collect(client.generate(token_ids=range(3, 10), max_new_tokens=num_tokens, sampling=greedy)).tokens)
