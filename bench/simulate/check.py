"""The simulator beside a real cluster of one prefill and one decode node: the same arrivals, on costs measured before.

Both nodes compute on the same cores. So the simulation has one processor that both share, and a step takes longer
while the other node computes, by the factors that calibration has seen.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench.head_of_line.clusters import running
from bench.serving.open_loop import run_trace
from bench.serving.outcome import Answered
from bench.serving.trace import Asked, Load, LogNormal, check_lengths, text_for, trace
from bench.simulate.calibrate import Calibration, MeasuredCosts
from bench.simulate.cluster import ClusterPlan, run
from bench.simulate.decode_model import DecodeLimits
from bench.simulate.figures import Times
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
_FAST: Final = 1e10
"""Bytes a second of a link inside a machine; no bound."""
_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One figure, measured and simulated."""

    name: str
    real: float
    simulated: float

    @property
    def ratio(self) -> float:
        """Simulated over real."""
        return self.simulated / self.real

    @property
    def is_within(self) -> bool:
        """Whether the simulation is as near as is wanted."""
        return abs(self.ratio - 1) <= WITHIN


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
        contention=(costs.prefill_contention, costs.decode_contention),
    )


def of_load(costs: MeasuredCosts, load: float, seconds: float) -> Load:
    """A window of Poisson arrivals that needs so much of the machine, were its requests served one by one."""
    documents, answers = (
        LogNormal(median=256, sigma=0.8, low=64, high=2048),
        LogNormal(median=24, sigma=0.6, low=4, high=96),
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
        of_real, of_simulated = (Times.of(getattr(each, name) for each in side) for side in (real, simulated))
        for which in ("mean", "p50", "p95"):
            both = getattr(of_real, which), getattr(of_simulated, which)
            if None not in both:
                found.append(Pair(name=f"{name} {which}", real=both[0], simulated=both[1]))
    found.append(Pair(name="new tokens/s", real=_tokens_per_s(real), simulated=_tokens_per_s(simulated)))
    return found


def _tokens_per_s(answered: Sequence[Answered]) -> float:
    return sum(each.num_new_tokens for each in answered) / max(each.at_s + each.total_s for each in answered)
