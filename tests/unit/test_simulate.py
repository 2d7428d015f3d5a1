"""The simulator of clusters: its clock, its models of what takes time, and whole runs against theory."""

import asyncio
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.roofline.machine import machine
from bench.roofline.model import Prompt, first_step_s, prefill_s
from bench.serving.outcome import Answered
from bench.serving.trace import LogNormal
from bench.simulate.check import Pair, pairs, ratio_interval
from bench.simulate.cluster import ClusterPlan, Simulated, run
from bench.simulate.costs import Costs, DecodeWork, MachineCosts
from bench.simulate.decode_model import DecodeLimits
from bench.simulate.network import Link, send
from bench.simulate.prefill_model import PrefillLimits, PrefillModel
from bench.simulate.processor import Contention, Cores, OwnProcessor, SharedProcessor
from bench.simulate.requests import SimRequest
from bench.simulate.scaling import ScalingPlan
from bench.simulate.virtual_time import NothingLeft, simulate
from bench.simulate.workload import Always, Workload
from cluster.autoscaling.policy import ScalingLimits
from cluster.autoscaling.signals import PoolScaling
from colm.model.presets import preset
from colm.nodes import Role
from decode_node.step_budget import StepBudget
from prefill_node.cost_model import CostModel, PrefillShape, Work
from tests.tiny import tiny_config

TINY = tiny_config()
TILE_TOKENS = 64
FAST = 1e15
"""Bytes a second: a network that takes no time."""


class StubCosts:
    """Every decode step takes as long, and so does every token of a prefill."""

    def __init__(self, *, decode_s: float = 0.01, token_s: float = 0.0, context_s: float = 0.0) -> None:
        self._decode_s, self._token_s, self._context_s = decode_s, token_s, context_s

    def prefill_step_s(self, work: Work) -> float:
        return max(1e-9, self._token_s * work.linear_flops / self._token_flops)

    def decode_step_s(self, work: DecodeWork) -> float:
        return self._decode_s + self._context_s * work.num_context_tokens

    def believed(self) -> CostModel:
        shape = PrefillShape.of(TINY, TILE_TOKENS)
        flop_s = max(1e-12, self._token_s / self._token_flops)
        return CostModel(shape=shape, linear_flop_s=flop_s, attention_flop_s=0.0, step_s=0.0)

    @property
    def _token_flops(self) -> float:
        shape = PrefillShape.of(TINY, TILE_TOKENS)
        return shape.work(TILE_TOKENS + 1).linear_flops / (TILE_TOKENS + 1)


def plan(*, num_prefill: int = 1, num_decode: int = 1, **decode: int) -> ClusterPlan:
    limits = {"num_pages": 1 << 16, "max_requests": 1 << 12, "max_batch_size": 32} | decode
    return ClusterPlan(
        config=TINY,
        num_prefill=num_prefill,
        num_decode=num_decode,
        prefill=PrefillLimits(memory_bytes=1 << 40, max_queued=1 << 12, max_queued_s=1e9),
        decode=DecodeLimits(
            page_tokens=4, max_local_prefill_tokens=12, budget=StepBudget(step_tokens=8, max_tokens=8), **limits
        ),
        link_bytes_per_s=FAST,
        max_streams=16,
        max_requests=1 << 12,
    )


def simulated(plan: ClusterPlan, costs: Costs, requests: Iterator[SimRequest], seed: int = 0) -> Simulated:
    return run(plan, costs, requests, seed=seed, ended=lambda _: None)


class Geometric:
    """Lengths without memory, as exponential service has."""

    def __init__(self, mean: float) -> None:
        self._mean = mean

    def draw(self, count, rng):
        return rng.geometric(1 / self._mean, count)


def workload(**changed: object) -> Workload:
    of_all = {
        "rate_per_s": 2.0,
        "num_requests": 60,
        "prompts": LogNormal(median=60, sigma=1.0, low=1, high=400),
        "answers": LogNormal(median=10, sigma=0.8, low=1, high=60),
        "num_chains": 2,
        "max_context": 1 << 12,
    }
    return Workload(**of_all | changed)  # type: ignore[arg-type]


# The clock.


def test_time_jumps_from_timer_to_timer() -> None:
    async def main() -> list[float]:
        loop, seen = asyncio.get_running_loop(), list[float]()
        for after_s in (3600.0, 0.1, 7.0):
            loop.call_later(after_s, lambda: seen.append(loop.time()))
        await asyncio.sleep(86_400 * 3)
        return [*seen, loop.time()]

    assert simulate(main()) == pytest.approx([0.1, 7.0, 3600.0, 86_400 * 3])


def test_garbage_is_looked_for_as_often_after_a_simulation_as_before() -> None:
    before = gc.get_threshold()
    assert simulate(_thresholds()) != before
    assert gc.get_threshold() == before


async def _thresholds() -> tuple[int, int, int]:
    return gc.get_threshold()


def test_who_waits_for_nothing_is_told() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(NothingLeft, match="no timer"):
        simulate(main())


# What takes time.


def test_a_tile_passes_both_links_at_once_and_waits_for_the_slower() -> None:
    slow, fast = Link(1.0), Link(2.0)
    assert send(10, fast, slow, at_s=0.0) == 10  # not 5 and then 10
    assert send(10, fast, slow, at_s=0.0) == 20
    assert send(10, slow, fast, at_s=100.0) == 110
    assert (slow.num_bytes, fast.num_bytes) == (30, 30)


def test_users_of_shared_cores_slow_each_other_down() -> None:
    async def main() -> list[tuple[str, float]]:
        loop, ended = asyncio.get_running_loop(), list[tuple[str, float]]()

        def note(name: str) -> None:
            ended.append((name, loop.time()))

        cores = Cores()
        both = Contention((1, 3), decode=(2.0, 4.0), prefill=(1.0, 1.5))
        SharedProcessor(cores, both).run([2.0, 2.0], partial(note, "long"))
        await asyncio.sleep(1.0)
        # Until 4, when it has ended and the long one has 1.5 left: one at half speed, the other at a third.
        SharedProcessor(cores, both).run([1.0], partial(note, "short"), num_answers=1)
        await asyncio.sleep(10.0)
        return ended

    assert simulate(main()) == [("short", pytest.approx(4.0)), ("long", pytest.approx(5.5))]


@pytest.mark.parametrize("name", ["cpu", "h100"])
@pytest.mark.parametrize("num_tokens", [1000, 20_000])
def test_a_prefill_takes_what_the_machine_model_says(name: str, num_tokens: int) -> None:
    """But for where in a step the host waits, and bytes taken in proportion to operations: 3%."""
    config, of = preset("llama-3.1-8b-16-16-air"), machine(name)
    costs = MachineCosts(machine=of, config=config, tile_tokens=8192)

    async def main() -> float:
        node = PrefillModel("p", config, costs, _LIMITS, processor=OwnProcessor(), bytes_per_s=FAST)
        await node.prefill(num_tokens, Link(FAST))
        return asyncio.get_running_loop().time()

    wanted = prefill_s(of, Prompt(config=config, num_tokens=num_tokens, tile_tokens=8192))
    assert simulate(main()) == pytest.approx(wanted, rel=0.03)


_LIMITS = PrefillLimits(memory_bytes=1 << 40, max_queued=100, max_queued_s=1e9)


def test_a_decode_step_takes_what_the_machine_model_says() -> None:
    config, of = preset("llama-3.1-8b-16-16-air"), machine("h100")
    costs = MachineCosts(machine=of, config=config, tile_tokens=8192)
    step_s = costs.decode_step_s(DecodeWork(num_tokens={2: 1}, num_context_tokens=4096))
    assert step_s == pytest.approx(first_step_s(of, config, 4096))
    # As many rows as fill the device are bound by operations.
    assert costs.decode_step_s(DecodeWork(num_tokens={2: 4096}, num_context_tokens=0)) > 5 * step_s
    assert costs.decode_step_s(DecodeWork(num_tokens={1: 1}, num_context_tokens=0)) <= step_s


@pytest.mark.parametrize("num_tokens", [20, TILE_TOKENS, 3 * TILE_TOKENS + 1])
def test_a_prompt_behind_a_slow_link_arrives_with_its_last_byte(num_tokens: int) -> None:
    costs = StubCosts(token_s=1e-9)

    async def main() -> tuple[float, int]:
        node = PrefillModel("p", TINY, costs, _LIMITS, processor=OwnProcessor(), bytes_per_s=100.0)
        link = Link(FAST)
        await node.prefill(num_tokens, link)
        return asyncio.get_running_loop().time(), link.num_bytes

    seconds, num_bytes = simulate(main())
    assert num_bytes == num_tokens * TINY.num_layers * 2 * TINY.num_kv_heads * TINY.head_dim * 2
    assert seconds == pytest.approx(num_bytes / 100.0, rel=1e-3)


# Whole runs.


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    def times(seed: int) -> list[tuple[float, float]]:
        found = simulated(plan(num_prefill=2, num_decode=3), StubCosts(token_s=1e-3), workload().requests(seed), seed)
        return [(each.first_token_s, each.last_token_s) for each in found.requests]

    assert times(1) == times(1)
    assert times(1) != times(2)


@given(
    seed=st.integers(0, 1 << 16),
    num_decode=st.integers(1, 3),
    num_pages=st.integers(8, 60),
    max_batch_size=st.integers(1, 4),
    max_requests=st.integers(1, 6),
    burst_size=st.integers(1, 12),
)
@settings(max_examples=15, deadline=None)
def test_every_request_ends_once_and_every_page_returns(
    seed: int, num_decode: int, num_pages: int, max_batch_size: int, max_requests: int, burst_size: int
) -> None:
    small = replace(
        plan(num_prefill=2, num_decode=num_decode, num_pages=num_pages, max_batch_size=max_batch_size),
        max_requests=max_requests,
        prefill=PrefillLimits(memory_bytes=1 << 40, max_queued=1, max_queued_s=0.5),
    )
    load = workload(pattern="bursts", burst_size=burst_size, max_context=4 * num_pages, num_requests=40)
    found = simulated(small, StubCosts(token_s=1e-3), load.requests(seed), seed)  # which looks for lost pages
    assert len(found.requests) == 40
    for each in found.requests:
        if not each.error:
            assert each.at_s < each.first_token_s <= each.last_token_s
            assert each.last_token_s - each.first_token_s == pytest.approx(0.01 * (each.num_new_tokens - 1))
    assert any(not each.error for each in found.requests)


def test_steps_that_are_planned_alike_may_be_counted_together() -> None:
    """Against the same run step by step, as a shared processor makes it."""
    costs, load = StubCosts(token_s=1e-4, context_s=1e-6), workload(rate_per_s=20.0)
    whole = simulated(plan(num_decode=2, max_batch_size=3), costs, load.requests(5))
    steps = simulated(
        replace(plan(num_decode=2, max_batch_size=3), contention=Contention((1,), (0.0,), (0.0,))),
        costs,
        load.requests(5),
    )
    for together, alone in zip(whole.requests, steps.requests, strict=True):
        assert together.first_token_s == pytest.approx(alone.first_token_s, abs=1e-6)
        assert together.last_token_s == pytest.approx(alone.last_token_s, abs=1e-6)
    assert whole.decode_batch == pytest.approx(steps.decode_batch)
    assert sum(whole.gaps.num.values()) == sum(steps.gaps.num.values())


def in_line(found: Simulated, services_s: Sequence[float]) -> list[float]:
    """Waits for one server, first come, first served, by Lindley's recursion; the simulation's must be these."""
    waits_s, free_s = list[float](), 0.0
    for request, service_s in zip(found.requests, services_s, strict=True):
        waits_s.append(max(0.0, free_s - request.at_s))
        free_s = max(free_s, request.at_s) + service_s
    return waits_s


def deviation(rho: float, count: int) -> float:
    """Of the mean of so many waits in a row in M/M/1, in service times; Daley, J. Appl. Prob. 5 (1968), 683."""
    return math.sqrt(rho * (2 + 5 * rho - 4 * rho**2 + rho**3) / (1 - rho) ** 4 / count)


def test_one_place_in_the_batch_waits_as_a_queue_of_one_server_does() -> None:
    """M/G/1 by Pollaczek and Khinchine: geometric answers of one decode node that takes one at a time."""
    rho, mean, step_s, count = 0.3, 20.0, 0.01, 4000
    load = workload(
        rate_per_s=rho / (mean * step_s), num_requests=count, prompts=Always(1), answers=Geometric(mean), num_chains=1
    )
    found = simulated(plan(max_batch_size=1), StubCosts(decode_s=step_s), load.requests(3))
    waits_s = [each.first_token_s - each.at_s - step_s for each in found.requests]
    wanted = in_line(found, [step_s * each.num_new_tokens for each in found.requests])
    assert waits_s == pytest.approx(wanted, abs=1e-6)
    in_theory_s = load.rate_per_s * step_s**2 * (2 * mean**2 - mean) / (2 * (1 - rho))
    assert abs(sum(waits_s) / count - in_theory_s) < 4 * deviation(rho, count) * mean * step_s


def test_equal_prompts_wait_for_one_prefill_node_as_in_a_queue_of_constant_service() -> None:
    """M/D/1. The deviation is that of M/M/1, which is larger."""
    rho, count, num_tokens = 0.3, 2000, TILE_TOKENS + 1
    costs = StubCosts(decode_s=1e-6, token_s=1e-3)

    async def alone() -> float:
        node = PrefillModel("p", TINY, costs, _LIMITS, processor=OwnProcessor(), bytes_per_s=FAST)
        await node.prefill(num_tokens, Link(FAST))
        return asyncio.get_running_loop().time()

    service_s = simulate(alone())
    load = workload(rate_per_s=rho / service_s, num_requests=count, prompts=Always(num_tokens + 1), answers=Always(1))
    found = simulated(replace(plan(), max_streams=1 << 12), costs, load.requests(4))
    waits_s = [each.prefilled_s - each.at_s - service_s for each in found.requests]
    assert waits_s == pytest.approx(in_line(found, [service_s] * count), abs=1e-6)
    assert abs(sum(waits_s) / count - rho * service_s / (2 * (1 - rho))) < 4 * deviation(rho, count) * service_s


def test_a_pool_follows_its_load_and_what_it_has_when_it_shrinks_goes_on() -> None:
    """The real autoscaler, of a load that rises to four times as much and falls again."""
    limits = ScalingLimits(min_replicas=1, max_replicas=6, up_s=5.0, down_s=20.0)
    pools = tuple(PoolScaling(role=role, limits=limits, target=target) for role, target in _TARGETS.items())
    growing = replace(
        plan(max_batch_size=2, max_requests=8), scaling=ScalingPlan(pools=pools, start_s=3.0), max_requests=48
    )
    load = workload(pattern="steps", rate_per_s=4.0, num_requests=600, answers=Always(30), prompts=Always(40))
    found = simulated(growing, StubCosts(token_s=5e-3), load.requests(1))
    for role in _TARGETS:
        wanted = [pool.num_wanted for look in found.looks for pool in look.pools if pool.role is role]
        present = [pool.num_present for look in found.looks for pool in look.pools if pool.role is role]
        assert wanted[0] == present[0] == 1
        assert max(wanted) == max(present) > 1
        # Nobody is there before its start is over.
        assert present.index(2) >= next(n for n, each in enumerate(wanted) if each > 1) + 3
        assert wanted[-1] < max(wanted)
    first, last = found.requests[200:250], found.requests[-50:]
    assert sum(each.ttft_s or 9.0 for each in last) < sum(each.ttft_s or 9.0 for each in first)


_TARGETS = {Role.PREFILL: 0.5, Role.DECODE: 0.8}


def answered(ttft_s: float, tpot_s: float) -> Answered:
    request = SimRequest(number=0, at_s=1.0, num_prompt_tokens=9, num_new_tokens=11, num_chains=1)
    request.first_token_s = 1.0 + ttft_s
    request.last_token_s = request.first_token_s + 10 * tpot_s
    return request.answered()


def test_a_real_and_a_simulated_window_are_compared_figure_by_figure() -> None:
    found = {each.name: each for each in pairs([answered(1.0, 0.1)] * 100, [answered(1.1, 0.2)] * 100)}
    assert found["ttft_s p50"].ratio == pytest.approx(1.1)
    assert found["ttft_s p50"].is_within
    assert found["tpot_s mean"].ratio == pytest.approx(2.0)
    assert found["tpot_s mean"].verdict == "off"
    assert found["new tokens/s"].ratio == pytest.approx(3.0 / 4.1)


def test_a_figure_of_too_few_requests_says_nothing() -> None:
    """Equal but for one long wait that only the real cluster had: it decides the mean of 120 requests, not of 2,400."""
    waits = [answered(1.0, 0.1)] * 119

    def found(real: list[Answered], simulated: list[Answered]) -> dict[str, Pair]:
        return {each.name: each for each in pairs(real, simulated)}

    few = found([*waits, answered(60.0, 0.1)], [*waits, answered(1.0, 0.1)])
    assert few["ttft_s p50"].is_within
    assert few["ttft_s mean"].low < 0.7 < few["ttft_s mean"].high == 1.0
    assert few["ttft_s mean"].verdict == "too few requests to say"
    many = found([*waits * 20, answered(60.0, 0.1)], [*waits * 20, answered(1.0, 0.1)])
    assert many["ttft_s mean"].is_within
    # All draws of 14 requests in blocks of 10 are alike, and seemed to be sure.
    assert found(waits[:14], waits[:14])["ttft_s mean"].verdict == "too few requests to say"


def test_the_interval_of_a_ratio_has_the_coverage_that_it_says() -> None:
    """Of 40 windows of 200 requests, 38 intervals should contain the true ratio of means; 4 deviations are 5.5."""
    rng, num_good = np.random.default_rng(1), 0
    for _ in range(40):
        both_N2 = np.stack([rng.exponential(1.0, 200), 1.2 * rng.gamma(4.0, 0.25, 200)], axis=1)
        low, high = ratio_interval(both_N2, lambda values_N2: values_N2.mean(axis=-2))
        num_good += low <= 1.2 <= high
    assert num_good >= 32
