"""A pool's load, from what the nodes report of themselves. No clock, no I/O."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.autoscaling.policy import ScalingLimits, decode_demand, prefill_demand
from colm.nodes import NodeReport, PromptCost, Role, pool_name


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolScaling:
    """How a pool is scaled."""

    role: Role
    variant: str = ""
    """Of which further model, as `NodeReport` has it."""
    limits: ScalingLimits
    target: float
    """Of its signal: seconds of queued work on a prefill replica, or share of a decode replica in use."""

    @property
    def name(self) -> str:
        """Of the pool."""
        return pool_name(self.role, self.variant)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLoad:
    """A pool's load at one moment."""

    demand: float
    """Replicas that would carry it at the pool's target."""
    queued_s: float = 0.0
    """Engine time of the prompts on prefill nodes and in line for one, as estimated."""


class Signal(Protocol):
    """Of one pool."""

    def look(self, nodes: Sequence[NodeReport], now_s: float) -> PoolLoad:
        """The load now.

        Args:
            nodes: last reports of all nodes, whatever their role and model.
            now_s: on any clock, later than at the last look.
        """


class PrefillSignal:
    """Seconds of work: what prefill nodes estimate of their prompts, and the lengths of those that wait for one."""

    def __init__(self, target_queue_s: float) -> None:
        self._target_queue_s = target_queue_s
        self._cost = PromptCost(token_s=0.0, pair_s=0.0)
        """As the last prefill node told: those that wait have none, perhaps since all are lost."""
        self._engine_s: dict[str, float] = {}
        self._last_s = 0.0

    def look(self, nodes: Sequence[NodeReport], now_s: float) -> PoolLoad:
        """The queue in all, and how many engines have worked since the last look."""
        prefill = [node for node in nodes if node.role is Role.PREFILL]
        costs = [cost for node in prefill if (cost := node.load.prompt_cost) is not None]
        if costs:  # the nodes share a model; where their machines differ, a prompt may go to any of them
            self._cost = PromptCost(
                token_s=sum(cost.token_s for cost in costs) / len(costs),
                pair_s=sum(cost.pair_s for cost in costs) / len(costs),
            )
        waiting_tokens = [num_tokens for node in nodes for num_tokens in node.load.waiting_tokens]
        queued_s = sum(node.load.work_s for node in prefill) + sum(map(self._cost.seconds, waiting_tokens))
        demand = prefill_demand(
            queued_s=queued_s,
            num_prompts=len(waiting_tokens)
            + sum(node.num_active_requests + node.num_queued_requests for node in prefill),
            num_busy=self._num_busy(prefill, now_s),
            target_queue_s=self._target_queue_s,
        )
        return PoolLoad(demand=demand, queued_s=queued_s)

    def _num_busy(self, prefill: Sequence[NodeReport], now_s: float) -> float:
        taken_s, before = now_s - self._last_s, self._engine_s
        self._last_s, self._engine_s = now_s, {node.replica_id: node.load.engine_s for node in prefill}
        worked_s = [engine_s - before[key] for key, engine_s in self._engine_s.items() if key in before]
        return sum(min(max(each_s / taken_s, 0.0), 1.0) for each_s in worked_s)


class DecodeSignal:
    """Pages that are reserved or waited for, and places in the batch, of one model's decode nodes.

    What a request holds while its prompt stands in line for an engine is the prefill pool's load: more decode nodes
    would only lengthen that line. So is, in the same share, what waits for what such requests hold.

    Args:
        target_use: share of both that a replica should have in use.
        num_waiting: requests that wait for a decode node, at the gateway.
        variant: which model's, as `NodeReport` has it.
    """

    def __init__(self, target_use: float, num_waiting: Callable[[], int], variant: str = "") -> None:
        self._target_use = target_use
        self._variant = variant
        self._num_waiting = num_waiting
        self._capacity: tuple[int, int] | None = None
        """Pages and places of a node, as the last one told."""

    def look(self, nodes: Sequence[NodeReport], now_s: float) -> PoolLoad:  # noqa: ARG002 - as every signal
        """What requests hold and wait for."""
        of_all = [node for node in nodes if node.role is Role.DECODE]
        decode = [node for node in of_all if node.variant == self._variant]
        if decode:
            self._capacity = decode[0].num_pages_total, decode[0].load.num_places
        if self._capacity is None:
            return PoolLoad(demand=0.0)
        pages, places = self._capacity
        num_active = sum(node.num_active_requests for node in decode)
        num_queued = sum(node.num_queued_requests for node in decode)
        num_prefilling = sum(node.load.num_prefilling for node in decode)
        # All models' prompts stand in the one line, so the share that does is of all of them.
        all_prefilling = sum(node.load.num_prefilling for node in of_all)
        in_line = min(1.0, _num_in_line(nodes) / all_prefilling) if all_prefilling else 0.0
        demand = decode_demand(
            num_pages=_own(
                held=sum(node.num_pages_used for node in decode),
                of_line=in_line * sum(node.load.num_pages_prefilling for node in decode),
                waited_for=sum(node.load.num_pages_wanted for node in decode),
            ),
            pages_per_replica=pages,
            num_requests=_own(
                held=num_active + num_prefilling,
                of_line=in_line * num_prefilling,
                waited_for=num_queued - num_prefilling + self._num_waiting(),
            ),
            places_per_replica=places,
            target_use=self._target_use,
        )
        return PoolLoad(demand=demand)


def _num_in_line(nodes: Sequence[NodeReport]) -> int:
    """Prompts for which there is no engine: all beyond one for each prefill node."""
    prefill = [node for node in nodes if node.role is Role.PREFILL]
    num_prompts = sum(len(node.load.waiting_tokens) for node in nodes)
    num_prompts += sum(node.num_active_requests + node.num_queued_requests for node in prefill)
    return max(0, num_prompts - len(prefill))


def _own(*, held: float, of_line: float, waited_for: float) -> float:
    """What is the decode pool's load, of what is held and what is waited for; `of_line` of what is held is not."""
    own = held - of_line
    return own + waited_for * (own / held if held else 1.0)


def signal_of(scaling: PoolScaling, num_waiting: Callable[[str], int]) -> Signal:
    """The signal of a pool; `num_waiting` as for `DecodeSignal`, by variant."""
    if scaling.role is Role.PREFILL:
        return PrefillSignal(scaling.target)
    return DecodeSignal(scaling.target, lambda: num_waiting(scaling.variant), scaling.variant)
