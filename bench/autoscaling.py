"""Replicas that follow a load in steps, on a cluster of this machine: `python -m bench.autoscaling --json --plot FILE`.

One prefill replica may become two, each on one thread, so that the second brings a core of its own. Prompts, all
different, come at even times whether or not earlier ones are answered: first a part of what one engine computes, then
more than it can, then a part again. The client notes each request's outcome, and twice a second what the gateway says
of the pool. No request may fail. The look-backs are short: it takes two and a half minutes on two cores.
"""

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.autoscaling_plot import write_plot
from bench.harness.environment import environment
from bench.harness.suite import positive
from bench.harness.units import duration
from bench.head_of_line.clusters import running
from bench.serving.open_loop import LEAD_S, run_trace
from bench.serving.outcome import Answered
from bench.serving.trace import Asked
from cluster.cli.output import interruptible, note
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import AsyncClient, Client
from colm.errors import ColmError
from colm.nodes import Role
from colm.sampling import SamplingParams

MODEL: Final = Path("models/SmolLM2-135M-Instruct-9-3")
PHASES: Final = ((15.0, 0.3), (45.0, 1.5), (30.0, 0.3))
"""(seconds, prompts' engine time that comes a second)."""
SCALING: Final = {"max_replicas": 2, "target_queue_s": 4.0, "scale_up_s": 5.0, "scale_down_s": 15.0}
OPTIONS: Final[dict[str, object]] = {
    **{f"prefill.{name}": value for name, value in SCALING.items()},
    "prefill.num_threads": 1,
    "prefill.prefix_cache_bytes": 0,
    "decode.num_threads": 1,
    "decode.prefix_cache_bytes": 0,
    "gateway.max_requests": 1024,
    "decode.max_requests": 1024,
}
_LOOK_S = 0.5
_LIMIT_S = 180.0
"""For a request, and for the pool to become small again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The pool at one moment."""

    at_s: float
    """From the beginning of the first phase."""
    num_present: int
    num_wanted: int
    demand: float
    queued_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What was measured."""

    prompt_s: float
    """Engine time of a prompt, alone."""
    seen: Sequence[Seen]
    answered: Sequence[Answered]

    @property
    def step_s(self) -> float:
        """When the load rises."""
        return PHASES[0][0]

    @property
    def fall_s(self) -> float:
        """When it falls again."""
        return self.step_s + PHASES[1][0]

    def metrics(self) -> dict[str, float | None]:
        """In seconds from the step, or from its end, until the pool had that many; None where it never had."""
        finished = [each for each in self.answered if each.outcome == "finished"]
        return {
            "step_to_wanted_s": self._first(self.step_s, lambda seen: seen.num_wanted == 2),
            "step_to_present_s": self._first(self.step_s, lambda seen: seen.num_present == 2),
            "fall_to_wanted_s": self._first(self.fall_s, lambda seen: seen.num_wanted == 1),
            "fall_to_present_s": self._first(self.fall_s, lambda seen: seen.num_present == 1),
            "longest_queue_s": max(seen.queued_s for seen in self.seen),
            "longest_first_token_s": max((each.ttft_s or 0.0 for each in finished), default=0.0),
            "num_requests": len(self.answered),
            "num_failed": len(self.answered) - len(finished),
            "num_changes": sum(a.num_wanted != b.num_wanted for a, b in pairwise(self.seen)),
        }

    def _first(self, after_s: float, holds: Callable[[Seen], bool]) -> float | None:
        times = (seen.at_s - after_s for seen in self.seen if seen.at_s >= after_s and holds(seen))
        return next((round(at_s, 2) for at_s in times), None)


def prompts(prompt_s: float, num_tokens: int, vocab_size: int, seed: int) -> Iterator[Asked]:
    """The phases' requests: at even times, no two of which begin alike."""
    rng, began_s = np.random.default_rng(seed), 0.0
    for seconds, load in PHASES:
        for at_s in np.arange(began_s, began_s + seconds, prompt_s / load):
            token_ids_N = rng.integers(3, vocab_size, num_tokens)
            yield Asked(at_s=float(at_s), token_ids_N=token_ids_N, max_new_tokens=1, prefix=None)
        began_s += seconds


async def measure(state: ClusterState, num_tokens: int, vocab_size: int, seed: int) -> Trace:
    """Run the phases.

    Raises:
        ColmError: the cluster does not answer.
    """
    with Client(state.gateway_address, state.security) as client:
        taken_s = []
        for token_ids_N in np.random.default_rng(seed + 1).integers(3, vocab_size, (3, num_tokens)):
            *_, finished = client.generate(
                token_ids=token_ids_N, max_new_tokens=1, sampling=SamplingParams(ignore_eos=True)
            )
            taken_s.append(finished.timings.prefill_s)  # type: ignore[union-attr]
    prompt_s, seen, is_over = min(taken_s), list[Seen](), asyncio.Event()
    began_s = time.monotonic() + LEAD_S
    asked = list(prompts(prompt_s, num_tokens, vocab_size, seed))
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch(state, began_s, seen, is_over))
        answered = await run_trace(state.gateway_address, state.security, asked, timeout_s=_LIMIT_S, ended=lambda: None)
        while seen[-1].num_present > 1 and time.monotonic() < began_s + _LIMIT_S:
            await asyncio.sleep(_LOOK_S)
        is_over.set()
    return Trace(prompt_s=prompt_s, seen=seen, answered=answered)


async def _watch(state: ClusterState, began_s: float, seen: list[Seen], is_over: asyncio.Event) -> None:
    async with AsyncClient(state.gateway_address, state.security) as client:
        while not is_over.is_set():
            pools = {pool.role: pool for pool in (await client.cluster_status()).pools}
            if (pool := pools.get(Role.PREFILL)) is not None:  # the gateway has looked already
                seen.append(
                    Seen(
                        at_s=round(time.monotonic() - began_s, 2),
                        num_present=pool.num_present,
                        num_wanted=pool.num_wanted,
                        demand=round(pool.demand, 3),
                        queued_s=round(pool.queued_s, 3),
                    )
                )
            await asyncio.sleep(_LOOK_S)


class AutoscalingOptions(argparse.Namespace):
    """Of this benchmark."""

    model: Path
    tokens: int
    seed: int
    json: bool
    output: Path | None
    plot: Path | None


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.autoscaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, metavar="DIR", help=f"checkpoint that is served; {MODEL}")
    add("--tokens", type=positive, default=512, help="of each prompt; 512")
    add("--seed", type=int, default=0, help="of the prompts; 0")
    add("--plot", type=Path, metavar="FILE", help="draw replicas against the queue there; needs matplotlib")
    add("--output", type=Path, metavar="FILE", help="write the record there")
    add("--json", action="store_true", help="end with one JSON record")
    return parser


def main() -> None:
    """Measure, and say whether a request failed."""
    options = parser().parse_args(namespace=AutoscalingOptions())
    try:
        with interruptible("interrupted"), running(options.model, None, OPTIONS) as state:
            vocab_size = Checkpoint.open(options.model).config.vocab_size
            trace = asyncio.run(measure(state, options.tokens, vocab_size, options.seed))
    except ColmError as err:
        note(f"error: {err}")
        raise SystemExit(1) from err
    metrics = trace.metrics()
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, "never" if value is None else duration(value) if name.endswith("_s") else f"{value:g}")
    Console(highlight=False).print(table)
    record = {
        "benchmark": "bench.autoscaling",
        "measured": "whole",
        "command": shlex.join(["python", "-m", "bench.autoscaling", *sys.argv[1:]]),
        **environment(),
        "model": options.model.name,
        "prompt_tokens": options.tokens,
        "seed": options.seed,
        "phases": PHASES,
        "scaling": SCALING,
        "prompt_s": trace.prompt_s,
        "metrics": metrics,
        "seen": [asdict(each) for each in trace.seen],
    }
    if options.output is not None:
        options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    if options.plot is not None:
        write_plot(options.plot, record)
    if options.json:
        sys.stdout.write(json.dumps(record) + "\n")
    if metrics["num_failed"]:
        raise SystemExit(f"{metrics['num_failed']:g} requests failed")


if __name__ == "__main__":
    main()
