"""Short prompts that are there at once: one after the other and several as one, through the engine and the loop.

Shapes: N prompt tokens, K kv heads, E head dim.
"""

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from colm_kernels import tolerance
from numpy.typing import NDArray

from bench.harness.contest import Case, Contest
from bench.kernels.common import short
from bench.prefill.case import CHECKED_LAYERS, CHECKED_VOCAB_SIZE, engine_of_random, exact_keys_values, prompt
from colm import defaults
from colm.clock import MonotonicClock
from colm.model.config import ChainConfig
from colm.model.transformer import slice_config
from colm.placement import CPU
from prefill_node import job_policy
from prefill_node.cost_model import CostModel, calibrate
from prefill_node.engine import PrefillEngine
from prefill_node.memory import default_memory_bytes
from prefill_node.prefill_job import PrefillOrder
from prefill_node.prefill_loop import PrefillLoop


@dataclass(frozen=True, kw_only=True)
class PackingCase(Case):
    """Prompts of one length that are there at once."""

    model: str
    config: ChainConfig
    dtype: torch.dtype
    tile_tokens: int
    num_prompts: int
    num_tokens: int

    @property
    def name(self) -> str:
        """Their number and length."""
        return f"packing_{self.num_prompts}x{self.num_tokens}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's name in place of its configuration."""
        return {
            "model": self.model, "dtype": short(self.dtype), "tile_tokens": self.tile_tokens,
            "num_prompts": self.num_prompts, "num_tokens": self.num_tokens,
        }  # fmt: skip

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Packs of one prompt, of two, and so on up to a tile."""
        engine = engine_of_random(self.config, self.dtype, self.tile_tokens, seed)
        prompts = [prompt(self.config, self.num_tokens, seed + number) for number in range(self.num_prompts)]
        largest = min(self.tile_tokens // self.num_tokens, self.num_prompts)
        sizes = sorted({min(1 << power, largest) for power in range(largest.bit_length() + 1)})
        yield Contest(
            check=partial(check_packed, self.config, self.dtype, self.num_tokens, seed),
            contenders={f"packs_of_{size}": partial(_turn, engine, prompts, size) for size in sizes},
            ours=f"packs_of_{sizes[-1]}",
            against=[f"packs_of_{size}" for size in sizes[:-1]],
            compared_by="cpu_s",  # of all threads; others on the machine disturb it less
        )


class WaitingCase(PackingCase):
    """The same prompts through the loop, which decides who shares steps with whom."""

    @property
    def name(self) -> str:
        """As the other's."""
        return f"waiting_{self.num_prompts}x{self.num_tokens}"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Steps shared as the policy says, and not at all."""
        engine = engine_of_random(self.config, self.dtype, self.tile_tokens, seed)
        prompts = [prompt(self.config, self.num_tokens, seed + number) for number in range(self.num_prompts)]
        costs = calibrate(engine, MonotonicClock())

        def turn(slowdown: float) -> Mapping[str, float]:
            with patch.object(job_policy, "SLOWDOWN", slowdown):
                ends_s = asyncio.run(wait_for_all(engine, costs, prompts))
            return {"mean_s": mean(ends_s), "last_s": max(ends_s)}

        yield Contest(
            check=partial(check_packed, self.config, self.dtype, self.num_tokens, seed),
            contenders={"shared": partial(turn, job_policy.SLOWDOWN), "alone": partial(turn, 1.0)},
            ours="shared",
            against=["alone"],
            compared_by="mean_s",
        )


async def wait_for_all(engine: PrefillEngine, costs: CostModel, prompts: Sequence[NDArray[np.int64]]) -> list[float]:
    """Ask for all prompts at once; when each one's last tile was there, in seconds from then."""
    loop = PrefillLoop(
        engine,
        costs,
        MonotonicClock(),
        max_queued=len(prompts),
        max_queued_s=math.inf,
        memory_bytes=default_memory_bytes(CPU),
        lease_s=defaults.JOB_LEASE_S,
        stall_s=defaults.STALL_S,
    )
    began_s = perf_counter()

    async def read(number: int) -> float:
        stream = loop.attach(PrefillOrder(transfer_id=str(number), epoch=1, token_ids=prompts[number]))
        async for tile in stream.tiles():
            stream.acknowledge(tile.end)
        return perf_counter() - began_s

    ends_s = await asyncio.gather(*map(read, range(len(prompts))))
    await loop.stop()
    return list(ends_s)


def _turn(engine: PrefillEngine, prompts: Sequence[NDArray[np.int64]], pack_size: int) -> Mapping[str, float]:
    began_s, began_cpu_s = perf_counter(), process_time()
    prefill_all(engine, prompts, pack_size)
    return {"s": perf_counter() - began_s, "cpu_s": process_time() - began_cpu_s}


def prefill_all(engine: PrefillEngine, prompts: Sequence[NDArray[np.int64]], pack_size: int) -> None:
    """Compute prompts in packs of a size."""
    for first in range(0, len(prompts), pack_size):
        runs = [engine.begin(each) for each in prompts[first : first + pack_size]]
        while not runs[0].is_over:
            engine.step(runs)


@torch.inference_mode()
def check_packed(config: ChainConfig, dtype: torch.dtype, num_tokens: int, seed: int) -> None:
    """Hold keys and values of three prompts as one against the model's definition in float64, in few layers.

    Raises:
        AssertionError: one is off by more than its budget.
    """
    config = replace(config, num_layers=CHECKED_LAYERS, vocab_size=CHECKED_VOCAB_SIZE)
    engine = engine_of_random(config, dtype, 3 * num_tokens, seed)
    runs = [engine.begin(prompt(config, max(1, num_tokens - less), seed + less)) for less in range(3)]
    exact = [exact_keys_values(config, dtype, run.token_ids, seed) for run in runs]
    for layer in range(config.num_layers):
        for of_run, tile in zip(exact, engine.step(runs), strict=True):
            assert tile is not None
            for wanted, result in zip(of_run[layer], (tile.k_KTD, tile.v_KTD), strict=True):
                budget = tolerance.layers(wanted, dtype, num_layers=layer + 1, width=slice_config(config, 1).dim)
                budget.check(result)
