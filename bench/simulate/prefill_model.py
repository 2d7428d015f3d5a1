"""A prefill node without an engine: the real policy, quanta, costs and admission; the steps' time is modelled.

Real: `prefill_node.job_policy`, `quantum`, `cost_model` with its corrections, `memory`, and the window of each stream.
Modelled here: what a step takes (`costs`), the tiles' way to the decode node (`network`). An acknowledgement takes no
time. There are no broken streams, no leases that run out, no kept prefixes and no sparse attention.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, count, islice
from typing import NamedTuple

from bench.simulate.costs import KV_DTYPE, Costs
from bench.simulate.network import Link, send
from bench.simulate.processor import Processor
from colm.errors import CapacityExceeded
from colm.kv import KvFormat
from colm.kv_position import KvPosition
from colm.model.config import ChainConfig
from colm.wire.tile_codec import WINDOW_BYTES
from prefill_node.cost_model import PrefillShape, Work
from prefill_node.job_policy import wait_of
from prefill_node.memory import pack_bytes, run_bytes
from prefill_node.quantum import next_quantum


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillLimits:
    """Of one node; the options of the same names."""

    memory_bytes: int
    max_queued: int
    max_queued_s: float


class Tile(NamedTuple):
    """Sent, and not yet dropped from its window."""

    num_bytes: int
    arrives_s: float


class PrefillTask:
    """One prompt on a node: `prefill_node.job_policy.Candidate`, of dense attention and nothing kept.

    Args:
        num_tokens: of the prompt.
        place: in line.
        node: whose it is.
        receiver: the link of the decode node that reads it.
    """

    def __init__(self, num_tokens: int, place: int, node: "PrefillModel", receiver: Link) -> None:
        self.num_tokens = num_tokens
        self.place = place
        self.owed_s = 0.0
        self.receiver = receiver
        self.is_started = False
        self.arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the decode node has all of it."""
        self._node = node
        self._works = _works(node.shape, num_tokens)
        self._num_steps = 0
        self._num_all_steps = node.shape.num_layers * self._works.num_tiles
        self._work_left = self._works.left(0)
        self._window: deque[Tile] = deque()
        self._window_bytes = 0
        self._begun_bytes = node.begun_bytes(num_tokens)

    @property
    def is_computed(self) -> bool:
        """There is no step left."""
        return self._num_steps == self._num_all_steps

    @property
    def has_reader(self) -> bool:
        """Readers stay."""
        return True

    @property
    def has_room(self) -> bool:
        """The window takes another tile."""
        return self.room_bytes > 0

    @property
    def room_bytes(self) -> int:
        """What the window takes before it is full."""
        return WINDOW_BYTES - self._held_bytes()

    @property
    def remaining_s(self) -> float:
        """As the node believes."""
        return 0.0 if self.is_computed else self._node.costs.seconds(self._work_left)

    @property
    def shared_s(self) -> float:
        """Likewise."""
        return self._node.costs.shared_s(self._work_left)

    @property
    def layer(self) -> int:
        """Of the next step."""
        return self._num_steps // self._works.num_tiles

    @property
    def tile_rows(self) -> int | None:
        """The prompt's length, where it is one tile."""
        return self.num_tokens if self.num_tokens <= self._node.shape.tile_tokens else None

    @property
    def memory_bytes(self) -> int:
        """As `PrefillJob` counts it."""
        return self._held_bytes() if self.is_computed else self._begun_bytes

    @property
    def next_arrival_s(self) -> float | None:
        """When the window has more room; None where all has arrived."""
        return self._window[0].arrives_s if self._held_bytes() else None

    def works_ahead(self) -> Iterator[Work]:
        """What each step takes that is still to be made."""
        return map(self._works.steps.__getitem__, range(self._num_steps, self._num_all_steps))

    def tile_tokens_ahead(self, num_steps: int) -> list[int]:
        """Tokens of the tiles that so many steps will make."""
        tile_tokens, num_tiles = self._node.shape.tile_tokens, self._works.num_tiles
        if num_tiles == 1:
            return [self.num_tokens] * num_steps
        numbers = range(self._num_steps, self._num_steps + num_steps)
        return [min(tile_tokens, self.num_tokens - number % num_tiles * tile_tokens) for number in numbers]

    def advance(self, tiles: Sequence["Tile"]) -> Work:
        """Note the tiles of steps, which are on their way; returns what these have done."""
        self._num_steps += len(tiles)
        left = self._works.left(self._num_steps)
        work, self._work_left = self._work_left - left, left
        self._window.extend(tiles)
        self._window_bytes += sum(tile.num_bytes for tile in tiles)
        return work

    def _held_bytes(self) -> int:
        window = self._window
        if window:
            now_s = self._node.now_s
            while window and window[0].arrives_s <= now_s:
                self._window_bytes -= window.popleft().num_bytes
        return self._window_bytes


@dataclass(frozen=True, slots=True)
class _Works:
    """Of a prompt's steps."""

    steps: tuple[Work, ...]
    """A step for each tile of each layer; those of all layers but the first and the last are the same objects."""
    num_tiles: int
    shape: PrefillShape
    num_tokens: int
    all: Work
    lefts: dict[int, Work] = field(default_factory=dict)

    def left(self, num_steps: int) -> Work:
        """What is still to be made after so many steps."""
        if num_steps not in self.lefts:
            layer, tile = divmod(num_steps, self.num_tiles)
            made = self.shape.work_before(KvPosition(layer, tile * self.shape.tile_tokens), self.num_tokens)
            self.lefts[num_steps] = self.all - made
        return self.lefts[num_steps]


@lru_cache(maxsize=4096)
def _works(shape: PrefillShape, num_tokens: int) -> _Works:
    def of_layer(layer: int) -> tuple[Work, ...]:
        at, works = KvPosition(layer, 0), []
        while at < KvPosition(layer + 1, 0):
            after = shape.after_step(at, num_tokens)
            works.append(shape.work_before(after, num_tokens) - shape.work_before(at, num_tokens))
            at = after
        return tuple(works)

    last = shape.num_layers - 1
    steps = first = of_layer(0)
    if last:
        steps = first + of_layer(1) * (last - 1) + of_layer(last)
    return _Works(steps, len(first), shape, num_tokens, shape.work(num_tokens))


@dataclass(slots=True)
class PrefillCounts:
    """What a node has done."""

    num_prompts: int = 0
    num_tokens: int = 0
    num_refused: int = 0
    engine_s: float = 0.0


class PrefillModel:
    """One prefill node. Lives on the simulation's loop.

    Args:
        address: names it.
        config: of the model whose chain 1 it computes.
        truth: what steps take.
        limits: of the node.
        processor: makes its steps.
        bytes_per_s: of its link.
    """

    def __init__(
        self,
        address: str,
        config: ChainConfig,
        truth: Costs,
        limits: PrefillLimits,
        *,
        processor: Processor,
        bytes_per_s: float,
    ) -> None:
        self.address = address
        self.counts = PrefillCounts()
        self.costs = truth.believed()
        self.shape = self.costs.shape
        self._config = config
        self._truth = truth
        self._limits = limits
        self._processor = processor
        self._link = Link(bytes_per_s)
        self._layer_token_bytes = KvFormat.of(config, KV_DTYPE).layer_token_bytes
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[PrefillTask, None] = {}
        self._places = count()
        self._stepping: Sequence[PrefillTask] = ()
        self._wake: asyncio.TimerHandle | None = None

    @property
    def now_s(self) -> float:
        """Simulated."""
        return self._loop.time()

    @property
    def remaining_s(self) -> float:
        """Engine time of all prompts that is still to come, as the node believes."""
        return sum(task.remaining_s for task in self._tasks)

    @property
    def num_waiting(self) -> int:
        """Prompts that have not begun."""
        return sum(not task.is_started for task in self._tasks)

    @property
    def num_begun(self) -> int:
        """Prompts that have begun, and are not all there."""
        return len(self._tasks) - self.num_waiting

    def begun_bytes(self, num_tokens: int) -> int:
        """What a prompt holds once it has begun, as `prefill_node.prefill_job.job_bytes` counts it."""
        tile_tokens = self.shape.tile_tokens
        tile_bytes = min(num_tokens, tile_tokens) * self._layer_token_bytes
        window_bytes = min(num_tokens * self._layer_token_bytes * self.shape.num_layers, WINDOW_BYTES + tile_bytes)
        job_bytes = sum(
            of(self._config, KV_DTYPE, num_tokens=num_tokens, tile_tokens=tile_tokens) for of in (run_bytes, pack_bytes)
        )
        return job_bytes + window_bytes

    async def prefill(self, num_tokens: int, receiver: Link) -> None:
        """Compute a prompt and bring it to a decode node's link.

        Raises:
            CapacityExceeded: too many wait already, or too much would go before it.
        """
        task = PrefillTask(num_tokens, next(self._places), self, receiver)
        wait = wait_of(task, self._tasks, memory_bytes=self._limits.memory_bytes)
        if wait.estimated_s > self._limits.max_queued_s or self.num_waiting > self._limits.max_queued:
            self.counts.num_refused += 1
            raise CapacityExceeded(f"prefill node {self.address} has no room")
        self._tasks[task] = None
        self._look_again()
        await task.arrived

    def _look_again(self) -> None:
        if self._stepping:
            return
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        quantum = next_quantum(self._tasks, self.costs, memory_bytes=self._limits.memory_bytes)
        if quantum is not None:
            self._begin([*quantum.own_s], quantum.num_steps)
            return
        # Only arrivals make room in a window, or in the memory.
        arrivals = [at_s for task in self._tasks if (at_s := task.next_arrival_s) is not None]
        if arrivals:
            self._wake = self._loop.call_at(min(arrivals), self._look_again)

    def _begin(self, stepping: Sequence[PrefillTask], num_steps: int) -> None:
        self._stepping = stepping
        for task in stepping:
            task.is_started = True
        tiles = [task.tile_tokens_ahead(num_steps) for task in stepping]
        fit = min(self._num_fitting(tokens, task.room_bytes) for task, tokens in zip(stepping, tiles, strict=True))
        steps_s, seen, step_s = list[float](), tuple[Work, ...](), 0.0
        for works in islice(zip(*(task.works_ahead() for task in stepping), strict=True), fit):
            if works != seen:
                seen, step_s = works, self._truth.prefill_step_s(Work.shared(works))
            steps_s.append(step_s)
        tokens_of = [each[:fit] for each in tiles]
        self._processor.run(steps_s, partial(self._stepped, steps_s, tokens_of, self.now_s))

    def _num_fitting(self, tile_tokens: Sequence[int], room_bytes: int) -> int:
        """How many of the next tiles are made: a window takes the one that fills it, and none behind."""
        if sum(tile_tokens) * self._layer_token_bytes < room_bytes:
            return len(tile_tokens)
        ends = enumerate(accumulate(tile_tokens), 1)
        return next(number for number, held in ends if held * self._layer_token_bytes >= room_bytes)

    def _stepped(self, steps_s: Sequence[float], tokens_of: Sequence[Sequence[int]], began_s: float) -> None:
        stepping, self._stepping = self._stepping, ()
        took_s = self.now_s - began_s
        # Where others use the processor as well, each step takes longer in proportion.
        slowdown = took_s / sum(steps_s)
        tiles: list[list[Tile]] = [[] for _ in stepping]
        for number, end_s in enumerate(accumulate(steps_s)):
            at_s = began_s + slowdown * end_s
            for task, tokens, sent in zip(stepping, tokens_of, tiles, strict=True):
                num_bytes = tokens[number] * self._layer_token_bytes
                sent.append(Tile(num_bytes, send(num_bytes, self._link, task.receiver, at_s=at_s)))
        works = [task.advance(sent) for task, sent in zip(stepping, tiles, strict=True)]
        self.costs.observe(Work.shared(works), took_s)
        self.counts.engine_s += took_s
        for task, sent in zip(stepping, tiles, strict=True):
            if task.is_computed:
                self.counts.num_prompts += 1
                self.counts.num_tokens += task.num_tokens
                self._loop.call_at(sent[-1].arrives_s, self._arrived, task)
        self._look_again()

    def _arrived(self, task: PrefillTask) -> None:
        del self._tasks[task]
        task.arrived.set_result(None)
        self._look_again()
