"""A prefill loop over a real engine whose steps wait at gates, and readers of its jobs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from colm.kv import KvTile
from colm.kv_position import KV_START, KvPosition
from prefill_node.cost_model import CostModel, PrefillShape
from prefill_node.encoded_tile import EncodedTile
from prefill_node.engine import PrefillEngine
from prefill_node.job_bytes import job_bytes
from prefill_node.job_policy import Wait
from prefill_node.job_stream import JobStream, Progress
from prefill_node.prefill_job import PrefillOrder
from prefill_node.prefill_loop import PrefillLoop
from prefill_node.prefill_run import PrefillRun
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.clock import FakeClock
from tests.gates import LIMIT_S, Gate, settle

NUM_TOKENS = 100
NUM_STEPS = 8  # two layers of four tiles
LEASE_S = 20.0
STALL_S = 30.0
SHORT, NUM_SHORT_STEPS = "s", 2  # two layers of a tile
LENGTHS = dict.fromkeys("abcd", NUM_TOKENS) | {SHORT: 10, "t": 15, "u": 25}  # s and t fit into a tile of 25 tokens
PROMPTS = {name: np.random.default_rng(seed).integers(0, 320, LENGTHS[name]) for seed, name in enumerate(LENGTHS)}
STEP_S = 1.0


class SteppedEngine(PrefillEngine):
    """Notes whose step it makes, and waits at a gate of each prompt in it before."""

    def prepare(self) -> None:
        self.steps: list[str] = []
        self.tiles: dict[str, list[KvTile]] = {name: [] for name in PROMPTS}
        self.gates = {name: Gate() for name in PROMPTS}
        for gate in self.gates.values():
            gate.open()

    def step(self, runs: Sequence[PrefillRun]) -> list[KvTile | None]:
        names = [
            next(name for name, prompt in PROMPTS.items() if np.array_equal(prompt, run.token_ids)) for run in runs
        ]
        for name in names:
            self.gates[name].pass_through()
        self.steps.append("+".join(names))
        tiles = super().step(runs)
        for name, tile in zip(names, tiles, strict=True):
            if tile is not None:
                self.tiles[name].append(KvTile(tile.layer, tile.first_token, tile.k_KTD.clone(), tile.v_KTD.clone()))
        return tiles


def order(name: str, epoch: int = 1, resume_from: KvPosition = KV_START) -> PrefillOrder:
    return PrefillOrder(transfer_id=name, epoch=epoch, token_ids=PROMPTS[name], resume_from=resume_from)


async def no_beat(_: Wait) -> None:
    pass


class Bench:
    """A loop over a real engine, and readers of its jobs."""

    def __init__(self, engine: SteppedEngine, *, num_begun: int = 2, step_s: float = STEP_S, **options: Any) -> None:
        self.engine = engine
        self.clock = FakeClock()
        shape = PrefillShape.of(engine.config, engine.tile_tokens)
        self.costs = CostModel(shape=shape, linear_flop_s=0.0, attention_flop_s=0.0, step_s=step_s)
        memory_bytes = num_begun * job_bytes(engine, NUM_TOKENS)
        chosen = {
            "max_queued": 4,
            "max_queued_s": 1e6,
            "memory_bytes": memory_bytes,
            "lease_s": LEASE_S,
            "stall_s": STALL_S,
            **options,
        }
        self.loop = PrefillLoop(engine, self.costs, self.clock, **chosen)

    async def read(
        self, stream: JobStream, num_tiles: int | None = None, progress: Progress | None = None
    ) -> list[EncodedTile]:
        """Take, store and acknowledge tiles; all of them, or so many."""
        await self.loop.turn(stream, no_beat)
        read: list[EncodedTile] = []
        async with asyncio.timeout(LIMIT_S):
            async for tile in stream.tiles(progress):
                stream.acknowledge(tile.end)
                read.append(tile)
                if len(read) == num_tiles:
                    break
        return read

    async def whole(self, name: str) -> list[EncodedTile]:
        stream = self.loop.attach(order(name))
        try:
            return await self.read(stream)
        finally:
            self.loop.detach(stream)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    @property
    def load(self) -> tuple[int, int]:
        return self.loop.load.num_active, self.loop.load.num_queued


@asynccontextmanager
async def a_bench(engine: SteppedEngine, **options: Any) -> AsyncIterator[Bench]:
    engine.prepare()
    bench = Bench(engine, **options)
    try:
        yield bench
    finally:
        for gate in engine.gates.values():
            gate.open()
        await bench.loop.stop()


async def two_shorts(bench: Bench) -> list[asyncio.Task[list[EncodedTile]]]:
    """Readers of s and t, whose jobs wait at their first step, which they share."""
    bench.engine.gates["a"].close()
    bench.engine.gates["t"].close()
    first = asyncio.create_task(bench.whole("a"))
    await bench.engine.gates["a"].until_reached()
    shorts = [asyncio.create_task(bench.whole(name)) for name in (SHORT, "t")]
    await settle()
    bench.engine.gates["a"].open()
    await bench.engine.gates["t"].until_reached()
    first.add_done_callback(lambda done: done.exception())
    return shorts


def sparse_plans(engine: PrefillEngine) -> PromptPlans:
    return PromptPlans(SparsePlanner(engine.config, SparsePolicy()))
