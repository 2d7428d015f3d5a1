"""What it costs a prefill node that prompts take turns: `python -m bench.job_switch --json`.

Two prompts of one length go through the prefill engine, a tile of a layer at a time: one after the other, and by turns,
a switch before each tile. `switch_s` is what a tile takes longer behind one of the other prompt than behind one of its
own: the median over all tiles, each compared with itself in the same round. `more_fraction` is what the whole takes
longer, of the whole. `cpu` is the time of all processors, which others on the machine disturb less. By turns at the
same layer, prompts share the weights that a cache holds, and drive each other's hidden states, keys and values out;
half the model apart, they drive out each other's weights too.

It runs the engine itself with random weights, once a short prompt's keys and values are those of the definition.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.harness.contest import Case, Contest
from bench.harness.suite import Options, arguments, num_tokens, positive, run
from bench.kernels.common import short
from bench.prefill.case import CHECKED_TILE_TOKENS, check_engine, engine_of_random, prompt
from colm.dtypes import fastest_dtype
from colm.flops import LayerFlops
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.model.transformer import slice_config
from colm.placement import CPU
from prefill_node.engine import PrefillEngine

MODEL = "llama-3.2-1b-8-8-8-8-air"

StepTimes = Sequence[Sequence[float]]
"""Of each prompt, the seconds of each of its steps."""

CLOCKS: Mapping[str, Callable[[], float]] = {"s": perf_counter, "cpu_s": process_time}
"""By the unit of what they measure."""


@dataclass(frozen=True, kw_only=True)
class JobSwitchCase(Case):
    """Two prompts of one length."""

    model: str
    config: ChainConfig
    dtype: torch.dtype
    tile_tokens: int
    num_tokens: int

    @property
    def name(self) -> str:
        """Length and tile."""
        return f"job_switch_{self.num_tokens}_t{self.tile_tokens}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's name in place of its configuration."""
        return {
            "model": self.model, "dtype": short(self.dtype), "tile_tokens": self.tile_tokens,
            "num_tokens": self.num_tokens,
        }  # fmt: skip

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """One after the other, by turns at the same layer, and by turns half the model apart."""
        engine = engine_of_random(self.config, self.dtype, self.tile_tokens, seed)
        prompts = [prompt(self.config, self.num_tokens, seed + number) for number in range(2)]
        num_layers, num_tiles = self.config.num_layers, -(-self.num_tokens // self.tile_tokens)
        turns = _Turns(engine, prompts, num_layers * num_tiles)
        chain1, width = slice_config(self.config, 1), self.dtype.itemsize
        layer = LayerFlops.of(self.config)
        yield Contest(
            check=partial(check_engine, self.config, self.dtype, min(self.tile_tokens, CHECKED_TILE_TOKENS), seed),
            contenders={
                "one_after_the_other": turns.one_after_the_other,
                "by_turns": partial(turns.by_turns, 0),
                "by_turns_apart": partial(turns.by_turns, num_layers // 2 * num_tiles),
            },
            facts={
                "layer_weights_bytes": (layer.keys_values + layer.rest) // 2 * width,
                "tile_states_bytes": min(self.tile_tokens, self.num_tokens) * chain1.dim * width,
                "layer_keys_values_bytes": 2 * self.num_tokens * chain1.kv_dim * width,
            },
        )


class _Turns:
    """The contenders; those by turns are compared with the round's prompts one after the other."""

    def __init__(self, engine: PrefillEngine, prompts: Sequence[NDArray[np.int64]], num_steps: int) -> None:
        self._engine = engine
        self._prompts = prompts
        self._num_steps = num_steps
        self._unswitched: Mapping[str, StepTimes] = {}

    def one_after_the_other(self) -> Mapping[str, float]:
        """The second begins when the first is over."""
        self._unswitched = step_times(self._engine, self._prompts, in_turn(self._num_steps, self._num_steps))
        return {unit: _total(times) for unit, times in self._unswitched.items()}

    def by_turns(self, lead: int) -> Mapping[str, float]:
        """A switch before each step, once the first is so many steps ahead."""
        order, seen = in_turn(self._num_steps, lead), dict[str, float]()
        for unit, times in step_times(self._engine, self._prompts, order).items():
            unswitched, clock = self._unswitched[unit], unit.removesuffix("s")
            seen[unit] = _total(times)
            seen[f"switch_{unit}"] = switch_s(order, times, unswitched)
            seen[f"more_{clock}fraction"] = _total(times) / _total(unswitched) - 1
        return seen


def in_turn(num_steps: int, lead: int) -> list[int]:
    """Whose step is next, of two prompts of so many steps: the first leads by `lead`, the second ends alone."""
    return [0] * lead + [0, 1] * (num_steps - lead) + [1] * lead


def step_times(
    engine: PrefillEngine, prompts: Sequence[NDArray[np.int64]], order: Sequence[int]
) -> Mapping[str, StepTimes]:
    """Make the prompts' steps in an order, each to its end; what they take by each of the clocks."""
    runs = [engine.begin(each) for each in prompts]
    times: dict[str, list[list[float]]] = {unit: [[] for _ in prompts] for unit in CLOCKS}
    for number in order:
        began_s = {unit: clock() for unit, clock in CLOCKS.items()}
        engine.step([runs[number]])
        for unit, clock in CLOCKS.items():
            times[unit][number].append(clock() - began_s[unit])
    assert all(each.is_over for each in runs), "every step was made, and none failed"
    return times


def switch_s(order: Sequence[int], times: StepTimes, unswitched: StepTimes) -> float:
    """What a step takes longer behind one of the other prompt: the median over all such steps.

    Args:
        order: of the steps.
        times: of the steps in this order.
        unswitched: of the same steps where each prompt's follow one another; first steps do not count.
    """
    seen, longer = [0, 0], []
    for before, number in zip([order[0], *order], order, strict=False):
        place = seen[number]
        seen[number] += 1
        if number != before and place:
            longer.append(times[number][place] - unswitched[number][place])
    return median(longer)


def _total(times: StepTimes) -> float:
    return sum(map(sum, times))


class JobSwitchOptions(Options):
    """Of this benchmark."""

    preset: str
    lengths: list[int]
    tile_tokens: list[int]


def main() -> None:
    """Every length with every tile."""
    parser = arguments("bench.job_switch", __doc__)
    parser.add_argument("--preset", default=MODEL, help=f"a name of colm.model.presets.PRESETS; {MODEL}")
    parser.add_argument(
        "--lengths", type=num_tokens, nargs="+", default=[2 << 10, 8 << 10], help="of the prompts; 2K 8K"
    )
    parser.add_argument("--tile-tokens", type=positive, nargs="+", default=[128, 512], help="of the engine; 128 512")
    options = parser.parse_args(namespace=JobSwitchOptions())
    try:
        config = preset(options.preset)
    except ValueError as err:
        parser.error(f"--preset: {err}")
    cases = [
        JobSwitchCase(
            model=options.preset,
            config=config,
            dtype=fastest_dtype(CPU),
            tile_tokens=tile_tokens,
            num_tokens=num_tokens,
        )
        for num_tokens in options.lengths
        for tile_tokens in options.tile_tokens
    ]
    run(cases, options)


if __name__ == "__main__":
    main()
