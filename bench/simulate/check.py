"""The simulator beside a real cluster of one prefill and one decode node: the same arrivals, on costs measured before.

Both nodes compute on the same cores. So the simulation has one processor that both share, and a step takes longer
while the other node computes, by the factors that calibration has seen.

A figure of few requests says little. Both sides answer the same requests, so they are drawn anew in pairs, in blocks
of requests that arrived one after the other, since those have waited for each other: the ratio's interval is what 95 in
100 of such draws have (the moving block bootstrap; Künsch, Ann. Statist. 17 (1989), 1217).
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.head_of_line.clusters import running
from bench.serving.open_loop import run_trace
from bench.serving.outcome import Answered
from bench.serving.trace import Asked, Load, LogNormal, check_lengths, text_for, trace
from bench.simulate.calibrate import Calibration, MeasuredCosts
from bench.simulate.cluster import ClusterPlan, run
from bench.simulate.decode_model import DecodeLimits
from bench.simulate.prefill_model import PrefillLimits
from bench.simulate.requests import SimRequest
from bench.simulate.sizing import STEP_TOKENS
from cluster.options import ClusterConfig, load_config
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.dtypes import parse_dtype
from colm.kv import KvFormat
from colm.placement import CPU
from decode_node.kv_layout import KvLayout
from decode_node.step_budget import StepBudget
from prefill_node.memory import default_memory_bytes

WITHIN: Final = 0.15
"""What is wanted: of the real figure."""
OPTIONS: Final = {"decode.max_draft_tokens": 0, "decode.prefix_cache_bytes": 0, "prefill.prefix_cache_bytes": 0}
"""Of the cluster: what the simulator leaves out is off."""
BLOCK: Final = 10
"""Requests that are drawn together; about as many as come while one is served and waits."""
MIN_BLOCKS: Final = 10
_DRAWS: Final = 1000
_FAST: Final = 1e10
"""Bytes a second of a link inside a machine; no bound."""
_TIMEOUT_S: Final = 120.0

Figure = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Of each column of values, along the last axis but one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One figure, measured and simulated."""

    name: str
    real: float
    simulated: float
    low: float
    """Of the ratio's interval."""
    high: float
    num_requests: int

    @property
    def ratio(self) -> float:
        """Simulated over real."""
        return self.simulated / self.real

    @property
    def is_known(self) -> bool:
        """Whether the interval is narrow enough to tell a ratio that is wanted from one that is not.

        Of a few blocks all draws are alike, and their interval is narrow for that.
        """
        if self.num_requests < MIN_BLOCKS * BLOCK:
            return False
        return max(self.high - self.ratio, self.ratio - self.low) <= WITHIN

    @property
    def is_within(self) -> bool:
        """Whether the simulation is as near as is wanted, and enough requests say so."""
        return self.is_known and abs(self.ratio - 1) <= WITHIN

    @property
    def verdict(self) -> str:
        """In words."""
        return "within" if self.is_within else "off" if self.is_known else "too few requests to say"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A comparison."""

    costs: MeasuredCosts
    rate_per_s: float
    num_requests: int
    pairs: Sequence[Pair]


def check(
    model: Path, state_dir: Path | None, *, load: float, seconds: float, seed: int, tell: Callable[[str], None]
) -> Checked:
    """Bring a cluster up unless one runs, calibrate, put it under load, and simulate the same.

    Args:
        model: what it serves.
        state_dir: of a cluster that runs, with `OPTIONS`; None brings one up.
        load: share of the machine's time that the requests would need one by one.
        seconds: in which they arrive.
        seed: of arrivals, lengths and texts.
        tell: told what goes on.
    """
    checkpoint = Checkpoint.open(model)
    config, text = load_config(None, {"model.path": checkpoint.path}), text_for(checkpoint)

    async def measure(state: ClusterState) -> MeasuredCosts:
        async with AsyncClient(state.gateway_address, state.security) as client:
            calibration = Calibration(
                client, checkpoint.config, tile_tokens=config.prefill.tile_tokens, text=text, seed=seed
            )
            return await calibration.measure(lambda what: tell(f"measuring {what}"))

    with running(model, state_dir, OPTIONS) as state:
        costs = asyncio.run(measure(state))
        asked = trace(window := of_load(costs, load, seconds), text, [seed])
        check_lengths(window, checkpoint)
        tell(f"{len(asked)} requests in {seconds:g} s")
        sending = run_trace(state.gateway_address, state.security, asked, timeout_s=_TIMEOUT_S, ended=lambda: None)
        answered = asyncio.run(sending)
    # Loops do not nest: the simulation has one of its own.
    simulated = simulate_alike(plan_of(checkpoint, config, costs), costs, asked, checkpoint.config.num_chains)
    return Checked(costs=costs, rate_per_s=window.rate_per_s, num_requests=len(asked), pairs=pairs(answered, simulated))


def plan_of(checkpoint: Checkpoint, config: ClusterConfig, costs: MeasuredCosts) -> ClusterPlan:
    """The cluster that was measured: one node of each kind, on cores that both use."""
    dtype = parse_dtype(config.resolved_dtype)
    layout = KvLayout(KvFormat.of(checkpoint.config, dtype), config.decode.page_tokens)
    return ClusterPlan(
        config=checkpoint.config,
        num_prefill=1,
        num_decode=1,
        prefill=PrefillLimits(
            memory_bytes=default_memory_bytes(CPU),
            max_queued=config.prefill.max_queued,
            max_queued_s=config.prefill.max_queued_s,
        ),
        decode=DecodeLimits(
            num_pages=layout.pages_within(config.decode.kv_cache_bytes),
            page_tokens=layout.page_tokens,
            max_requests=config.decode.max_requests,
            max_batch_size=config.decode.max_batch_size,
            max_local_prefill_tokens=config.decode.max_local_prefill_tokens,
            budget=StepBudget(step_tokens=STEP_TOKENS, max_tokens=STEP_TOKENS),
        ),
        link_bytes_per_s=_FAST,
        max_streams=config.prefill.max_streams,
        max_requests=config.gateway.max_requests,
        gateway_s=costs.overhead_s,
        contention=costs.contention,
    )


def of_load(costs: MeasuredCosts, load: float, seconds: float) -> Load:
    """A window of Poisson arrivals that needs so much of the machine, were its requests served one by one.

    Short ones, so that there are many: a 95th percentile of 44 requests is the second longest.
    """
    documents, answers = (
        LogNormal(median=96, sigma=0.6, low=64, high=512),
        LogNormal(median=12, sigma=0.6, low=4, high=48),
    )
    rng, count = np.random.default_rng(0), 1000
    prompts, news = documents.draw(count, rng), answers.draw(count, rng)
    alone_s = sum(costs.prefill.seconds(costs.prefill.shape.work(int(each))) for each in prompts) / count
    alone_s += float((news * (costs.step_s + costs.answer_s) + news * prompts * costs.context_s).mean())
    return Load(
        pattern="poisson",
        rate_per_s=load / alone_s,
        seconds=seconds,
        burst_size=1,
        documents=documents,
        answers=answers,
        shared_fraction=0.0,
        num_prefixes=1,
        prefix_tokens=1,
    )


def simulate_alike(plan: ClusterPlan, costs: MeasuredCosts, asked: Sequence[Asked], num_chains: int) -> list[Answered]:
    """The same arrivals in the simulator."""
    requests = [
        SimRequest(
            number=number,
            at_s=each.at_s,
            num_prompt_tokens=len(each.token_ids_N),
            num_new_tokens=each.max_new_tokens,
            num_chains=num_chains,
        )
        for number, each in enumerate(asked)
    ]
    return [each.answered() for each in run(plan, costs, requests, seed=0, ended=lambda _: None).requests]


def pairs(real: Sequence[Answered], simulated: Sequence[Answered]) -> list[Pair]:
    """Mean, median and 95th percentile of both times, and the rate of tokens."""
    found = []
    for name in ("ttft_s", "tpot_s"):
        values = ((getattr(one, name), getattr(other, name)) for one, other in zip(real, simulated, strict=True))
        known = np.array([each for each in values if None not in each], dtype=np.float64).reshape(-1, 2)
        for which, figure in _FIGURES.items() if len(known) else ():
            of_real, of_simulated = figure(known)
            low, high = ratio_interval(known, figure)
            both = {"real": float(of_real), "simulated": float(of_simulated), "low": low, "high": high}
            found.append(Pair(name=f"{name} {which}", num_requests=len(known), **both))
    rates = _tokens_per_s(real), _tokens_per_s(simulated)
    ratio = rates[1] / rates[0]  # the arrivals say what it is: there is nothing to draw
    of_rate = {"real": rates[0], "simulated": rates[1], "low": ratio, "high": ratio}
    found.append(Pair(name="new tokens/s", num_requests=len(real), **of_rate))
    return found


def ratio_interval(pairs_N2: NDArray[np.float64], figure: Figure) -> tuple[float, float]:
    """What 95 in 100 draws of blocks have for the second column's figure over the first's.

    Args:
        pairs_N2: real and simulated, by arrival.
        figure: of each column.
    """
    rng, count = np.random.default_rng(0), len(pairs_N2)
    size = min(BLOCK, count)
    starts = rng.integers(0, count - size + 1, (_DRAWS, -(-count // size)))
    drawn = (starts[:, :, None] + np.arange(size)).reshape(_DRAWS, -1)[:, :count]
    of_real, of_simulated = figure(pairs_N2[drawn]).T
    low, high = np.percentile(of_simulated / of_real, (2.5, 97.5))
    return float(low), float(high)


def _percentile(percent: int) -> Figure:
    """As `bench.harness.percentile` has it, of each column."""
    return lambda values_N2: np.percentile(values_N2, percent, axis=-2, method="inverted_cdf")


_FIGURES: Final[Mapping[str, Figure]] = {
    "mean": lambda values_N2: values_N2.mean(axis=-2),
    "p50": _percentile(50),
    "p95": _percentile(95),
}


def _tokens_per_s(answered: Sequence[Answered]) -> float:
    return sum(each.num_new_tokens for each in answered) / max(each.at_s + each.total_s for each in answered)
