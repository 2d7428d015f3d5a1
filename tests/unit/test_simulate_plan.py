"""How few replicas do: the search, the shapes it draws from, its record and page, and the fit of measured costs."""

import asyncio
from argparse import ArgumentTypeError
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulate import record
from bench.simulate.__main__ import objective, parser
from bench.simulate.calibrate import BESIDE, Calibration, MeasuredCosts, nonnegative_fit
from bench.simulate.costs import DecodeWork
from bench.simulate.options import Question, SimulateOptions
from bench.simulate.planner import Objective, cheapest, fewest, plan
from bench.simulate.requests import SimRequest
from bench.simulate.shapes import PERCENTS, SHAPES, Quantiles
from bench.simulate.virtual_time import simulate
from colm.errors import ConfigError
from colm.events import Token
from colm.sampling import SamplingParams
from tests.tiny import tiny_config


def question(*words: str) -> Question:
    options = parser().parse_args(["run", "--requests", "150", *words], namespace=SimulateOptions())
    return Question.of(options)


@given(least=st.integers(1, 60), start=st.integers(1, 80), most=st.integers(0, 50))
def test_the_least_number_that_does_is_found_from_anywhere(least: int, start: int, most: int) -> None:
    asked: list[int] = []

    def does(number: int) -> bool:
        asked.append(number)
        assert 1 <= number <= most
        return number >= least

    assert fewest(does, start, most=most) == (least if least <= most else None)
    assert len(asked) == len(set(asked)) <= 16


@given(
    needed=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    least_decode=st.integers(1, 9),
    prefill=st.integers(2, 6),
    decode=st.integers(2, 6),
)
def test_the_cheapest_of_all_near_the_fewest_decode_replicas_is_found(
    needed: list[int], least_decode: int, prefill: int, decode: int
) -> None:
    """Prefill replicas that are needed beside the fewest decode replicas, one more, and two more, fall."""
    falling = sorted(needed, reverse=True)

    def meets(num_prefill: int, num_decode: int) -> bool:
        extra = num_decode - least_decode
        return extra >= 0 and num_prefill >= falling[min(extra, 2)]

    wanted = min(falling[extra] + least_decode + extra for extra in range(3))
    found = cheapest(meets, prefill, decode)
    assert found is not None
    assert meets(*found)
    assert sum(found) == wanted


def test_a_plan_holds_and_one_decode_replica_less_does_not() -> None:
    words = "--preset llama-3.2-1b-8-8-8-8-air --machine cpu --rate 0.05 --requests 60 --batch 2 --memory-gib 16"
    asked, wanted = question(*words.split(), "--shape", "azure-conversation"), Objective(ttft_s=60.0, tpot_s=1.0)
    found = plan(asked, 100.0, wanted, lambda _: None)
    assert found is not None
    counted = asked.ask(found.num_prefill, found.num_decode, 100.0).requests[12:]
    assert not any(each.error for each in counted)
    assert sum(map(wanted.missed, counted)) <= len(counted) * 5 // 100
    fewer = asked.ask(found.num_prefill, max(1, found.num_decode - 1), 100.0).requests[12:]
    assert found.num_decode == 1 or sum(map(wanted.missed, fewer)) > len(fewer) * 5 // 100


def test_an_objective_that_the_network_forbids_is_met_by_none() -> None:
    assert (
        plan(question("--rate", "1", "--shape", "azure-code"), 1.0, Objective(ttft_s=0.01, tpot_s=1.0), lambda _: None)
        is None
    )


def test_a_request_misses_its_objective_by_either_time_or_by_none() -> None:
    wanted = Objective(ttft_s=1.0, tpot_s=0.1)

    def request(first_s: float, last_s: float) -> SimRequest:
        return SimRequest(
            number=0,
            at_s=10.0,
            num_prompt_tokens=1,
            num_new_tokens=11,
            num_chains=1,
            first_token_s=first_s,
            last_token_s=last_s,
        )

    assert not wanted.missed(request(11.0, 12.0))
    assert wanted.missed(request(11.1, 12.0))
    assert wanted.missed(request(11.0, 12.1))
    assert wanted.missed(request(0.0, 0.0))


@pytest.mark.parametrize("text", ["1", "1,x", "0,1", "1,1,0", "1,1,95,3"])
def test_an_objective_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"0\.5,0\.05,95"):
        objective(text)


def test_options_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match="--chains=9"):
        question("--chains", "9")
    with pytest.raises(ConfigError, match="--memory-gib"):
        question("--memory-gib", "1")


@pytest.mark.parametrize("name", SHAPES)
def test_drawn_lengths_have_the_quantiles_and_the_mean_of_the_trace(name: str) -> None:
    """Of the mean: 3%, but answers of Azure's code, whose last thousandth is wide, 10%."""
    shape, rng = SHAPES[name], np.random.default_rng(7)
    for lengths, mean in ((shape.prompts, shape.mean_prompt_tokens), (shape.answers, shape.mean_answer_tokens)):
        drawn = lengths.draw(100_000, rng)
        wide = name == "azure-code" and lengths is shape.answers
        assert drawn.mean() == pytest.approx(mean, rel=0.10 if wide else 0.03)
        for percent, tokens in zip(PERCENTS, lengths.tokens, strict=True):
            # The share that is no longer, within what rounding and the draws' own deviation make.
            assert (drawn <= tokens).mean() * 100 >= percent - 0.6
            assert (drawn < tokens).mean() * 100 <= percent + 0.6


def test_quantiles_must_ascend() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Quantiles(tuple(range(len(PERCENTS), 0, -1)))


def test_the_page_shows_the_record() -> None:
    text = record.PAGE.read_text(encoding="utf-8")
    between = text.partition(record.BEGIN)[2].partition(record.END)[0]
    assert between.strip("\n").splitlines() == record.lines(record.load())


class FakeClient:
    """A cluster of known costs on the simulation's clock: one prefill at a time, steps by how many answers run."""

    def __init__(self) -> None:
        self.num_running = 0
        self.prefilling = asyncio.Lock()

    async def generate(
        self,
        *,
        token_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams,  # noqa: ARG002
    ) -> AsyncIterator[Token]:
        await asyncio.sleep(0.1)
        async with self.prefilling:
            await asyncio.sleep((len(token_ids) - 1) * 1e-3 * (2.5 if self.num_running else 1.0))
        self.num_running += 1
        try:
            for number in range(max_new_tokens):
                step_s = 0.02 + 0.002 * self.num_running + 1e-6 * (len(token_ids) + number) * self.num_running
                await asyncio.sleep(step_s * (1.5 if self.prefilling.locked() else 1.0))
                yield Token(token_id=1, text="", logprob=0.0, num_chains=1)
        finally:
            self.num_running -= 1


def test_calibration_finds_the_costs_of_a_cluster_that_are_known() -> None:
    """Bug: steps were also counted as beside a prompt while its request was on its way, and nothing was computed."""

    async def main() -> MeasuredCosts:
        client: Any = FakeClient()
        loop = asyncio.get_running_loop()
        calibration = Calibration(
            client,
            tiny_config(),
            tile_tokens=4096,
            text=lambda count, _: np.ones(count, dtype=np.int64),
            seed=0,
            now_s=loop.time,
        )
        return await calibration.measure(lambda _: None)

    found = simulate(main())
    step = DecodeWork(num_tokens={1: 4}, num_context_tokens=400)
    assert found.decode_step_s(step) == pytest.approx(0.02 + 0.008 + 400e-6, rel=0.01)
    assert found.overhead_s == pytest.approx(0.1, abs=1e-3)
    for num_tokens in (100, 1500):
        work = found.prefill.shape.work(num_tokens)
        assert found.prefill_step_s(work) == pytest.approx(num_tokens * 1e-3, rel=0.02)
    assert found.contention.decode == pytest.approx((0.5,) * len(BESIDE), rel=0.05)
    assert found.contention.prefill == pytest.approx((1.5,) * len(BESIDE), rel=0.05)


def test_a_fit_finds_factors_and_none_is_negative() -> None:
    rows = [[1.0, 1.0, 10.0], [1.0, 2.0, 5.0], [1.0, 4.0, 1.0], [1.0, 8.0, 3.0]]
    assert nonnegative_fit(rows, [sum(row) for row in rows]) == pytest.approx([1, 1, 1])
    falling = nonnegative_fit(rows, [3.0, 2.5, 2.0, 1.0])
    assert (falling >= 0).all()
    assert falling[0] > 0
