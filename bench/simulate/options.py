"""What the commands have in common: a model on a machine, a network, a workload."""

import argparse
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from bench.harness.suite import positive
from bench.roofline.machine import FOLDER, machine
from bench.serving.__main__ import above_zero, add_burstiness, log_normal
from bench.serving.trace import LogNormal
from bench.simulate.cluster import ClusterPlan, Ended, Simulated, run
from bench.simulate.costs import MachineCosts
from bench.simulate.scaling import ScalingPlan
from bench.simulate.shapes import SHAPES
from bench.simulate.sizing import decode_limits, prefill_limits
from bench.simulate.workload import PATTERNS, Lengths, Pattern, Workload
from colm import defaults
from colm.errors import ConfigError
from colm.model.config import ChainConfig
from colm.model.presets import preset

GPU_TILE_TOKENS: Final = 8192
"""As `bench.roofline` takes for GPUs."""


class SimulateOptions(argparse.Namespace):
    """Of every command."""

    command: "Callable[[SimulateOptions], None]"
    preset: str
    machine: str
    memory_gib: float
    tile_tokens: int
    batch: int
    lease_ms: float
    rate: float
    requests: int
    pattern: Pattern
    burst: int
    burstiness: float
    shape: str | None
    prompts: LogNormal
    answers: LogNormal
    chains: int | None
    seed: int
    json: bool


def add_common(parser: ArgumentParser, *, num_requests: int) -> None:
    """The options of every command."""
    add = parser.add_argument
    machines = sorted(path.stem for path in FOLDER.glob("*.toml"))
    add("--preset", default="llama-3.1-8b-8-8-8-8-air", metavar="NAME", help="model; llama-3.1-8b-8-8-8-8-air")
    add("--machine", choices=machines, default="h100", help="of every replica, see bench/roofline/machines; h100")
    add("--memory-gib", type=above_zero, default=80.0, metavar="GIB", help="of every replica's device; 80")
    add("--tile-tokens", type=positive, default=GPU_TILE_TOKENS, metavar="N", help="of prefill; 8192")
    add("--batch", type=positive, default=defaults.MAX_BATCH_SIZE, metavar="N", help="decode.max_batch_size; 32")
    add("--lease-ms", type=float, default=1.0, metavar="MS", help="what asking Ray Serve for a replica takes; 1")
    add("--rate", type=above_zero, default=1.0, metavar="R", help="requests a second; 1")
    add("--requests", type=positive, default=num_requests, metavar="N", help=f"that arrive; {num_requests}")
    add("--pattern", choices=PATTERNS, default="poisson", help="of arrivals; poisson")
    add("--burst", type=positive, default=8, metavar="N", help="requests that arrive together in a burst; 8")
    add_burstiness(parser)
    add("--shape", choices=sorted(SHAPES), help="lengths of a published trace, in place of the next two")
    what = "log-normal MEDIAN,SIGMA,LOW,HIGH of"
    prompts, answers = "1024,1,16,32768", "128,0.8,1,2048"
    add("--prompts", type=log_normal, default=prompts, metavar="LENGTHS", help=f"{what} prompt tokens; {prompts}")
    add("--answers", type=log_normal, default=answers, metavar="LENGTHS", help=f"{what} new tokens; {answers}")
    add("--chains", type=positive, metavar="N", help="that make the answers; all")
    add("--seed", type=int, default=0, help="of arrivals, lengths and Ray Serve's choices; 0")
    add("--json", action="store_true", help="end with one JSON object")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model on a machine, and what is asked of it."""

    config: ChainConfig
    costs: MachineCosts
    workload: Workload
    template: ClusterPlan
    """Of one replica of each."""
    seed: int

    @classmethod
    def of(cls, options: SimulateOptions) -> "Question":
        """What the options describe.

        Raises:
            ConfigError: a value is impossible; says which option.
        """
        config = preset(options.preset)
        num_chains = config.num_chains if options.chains is None else options.chains
        if num_chains > config.num_chains:
            raise ConfigError(f"--chains={num_chains}: {options.preset} has {config.num_chains}")
        memory_bytes = int(options.memory_gib * (1 << 30))
        decode = decode_limits(config, memory_bytes, max_batch_size=options.batch)
        template = ClusterPlan(
            config=config,
            num_prefill=1,
            num_decode=1,
            prefill=prefill_limits(config, memory_bytes),
            decode=decode,
            link_bytes_per_s=bytes_per_s(100.0),
            max_streams=defaults.MAX_STREAMS,
            max_requests=decode.max_requests,
            lease_s=options.lease_ms / 1e3,
        )
        prompts, answers = lengths(options)
        workload = Workload(
            rate_per_s=options.rate,
            num_requests=options.requests,
            prompts=prompts,
            answers=answers,
            num_chains=num_chains,
            max_context=min(config.max_context, decode.num_pages * decode.page_tokens),
            pattern=options.pattern,
            burst_size=options.burst,
            burstiness=options.burstiness,
        )
        costs = MachineCosts(machine=machine(options.machine), config=config, tile_tokens=options.tile_tokens)
        return cls(config=config, costs=costs, workload=workload, template=template, seed=options.seed)

    def scaled(self, scaling: ScalingPlan) -> "Question":
        """The same of pools that follow their load, where there are any."""
        if not scaling.pools:
            return self
        return replace(self, template=replace(self.template, scaling=scaling))

    def ask(self, num_prefill: int, num_decode: int, network_gbit: float, ended: Ended = lambda _: None) -> Simulated:
        """Simulate so many replicas."""
        plan = self.template.of(num_prefill, num_decode, bytes_per_s(network_gbit))
        return run(plan, self.costs, self.workload.requests(self.seed), seed=self.seed, ended=ended)


def lengths(options: SimulateOptions) -> tuple[Lengths, Lengths]:
    """Of prompts and of answers."""
    if options.shape is None:
        return options.prompts, options.answers
    shape = SHAPES[options.shape]
    return shape.prompts, shape.answers


def bytes_per_s(gbit_per_s: float) -> float:
    """Of a link."""
    return gbit_per_s * 1e9 / 8
