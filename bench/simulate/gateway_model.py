"""What the real placement asks for: nodes that reported, and calls to them."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Final

from bench.simulate.decode_model import DecodeModel
from bench.simulate.prefill_model import PrefillModel
from cluster.front_door.placement import DecodeJob, DecodeLease
from cluster.node_registry import NodeRegistry
from colm.clock import Clock, Deadline
from colm.events import Event, Finished, FinishReason, Timings, Usage
from colm.nodes import REPORT_INTERVAL_S, NodeLoad, NodeReport, NodeStatus, ProcessFacts, Role

_THIS_PROCESS: Final = ProcessFacts(pid=0, host="", resident_bytes=0)


class Reports(NodeRegistry):
    """What nodes reported within the last interval: the real registry's answer, made once an interval.

    Args:
        clock: of the simulation.
        prefill: nodes that serve, by address.
        decode: likewise.
        has_all: somebody asks for prefill nodes too; placement does not.
    """

    def __init__(
        self, clock: Clock, prefill: Mapping[str, PrefillModel], decode: Mapping[str, DecodeModel], *, has_all: bool
    ) -> None:
        super().__init__(clock)
        self._now_s = clock.now
        self._prefill = prefill
        self._decode = decode
        self._has_all = has_all
        self._made: tuple[float, list[NodeStatus]] | None = None

    def nodes(self) -> list[NodeStatus]:
        """At most an interval old."""
        now_s = self._now_s()
        if self._made is None or now_s - self._made[0] >= REPORT_INTERVAL_S:
            reports = [*map(_of_decode, self._decode.values())]
            if self._has_all:
                reports += map(_of_prefill, self._prefill.values())
            self._made = now_s, [NodeStatus(report=report, age_s=0.0) for report in reports]
        return self._made[1]

    def count(self, role: Role, variant: str | None = None) -> int:  # noqa: ARG002 - all are of one model
        """That serve now."""
        return len(self._decode if role is Role.DECODE else self._prefill)


def _of_decode(node: DecodeModel) -> NodeReport:
    pool, num_waiting = node.page_line.pool, node.page_line.num_waiting
    return NodeReport(
        role=Role.DECODE,
        replica_id=node.address,
        ray_node_id=node.address,
        address=node.address,
        num_active_requests=node.num_requests - num_waiting,
        num_queued_requests=num_waiting,
        num_leases=0,
        num_pages_total=pool.num_pages,
        num_pages_used=pool.num_used,
        load=NodeLoad(
            waiting_tokens=node.prefill_pool.waiting_tokens,
            num_pages_wanted=sum(wanted.num_pages for _, wanted in node.page_line.waiting),
            num_places=node.max_batch_size,
        ),
        process=_THIS_PROCESS,
    )


def _of_prefill(node: PrefillModel) -> NodeReport:
    return NodeReport(
        role=Role.PREFILL,
        replica_id=node.address,
        ray_node_id=node.address,
        address=node.address,
        num_active_requests=node.num_begun,
        num_queued_requests=node.num_waiting,
        num_leases=0,
        load=NodeLoad(work_s=node.remaining_s, engine_s=node.counts.engine_s, prompt_cost=node.costs.prompt_cost()),
        process=_THIS_PROCESS,
    )


class Calls:
    """`cluster.front_door.placement.DecodeNodeCalls`, without a network.

    Args:
        serve: what a node does: given its address, the request's id, and whether it may not wait.
    """

    def __init__(self, serve: Callable[[str, str, bool], Awaitable[None]]) -> None:
        self._serve = serve

    async def decode(
        self,
        lease: DecodeLease,
        job: DecodeJob,
        *,
        only_if_room: bool,
        deadline: Deadline,  # noqa: ARG002 - nothing is late in a simulation
    ) -> AsyncGenerator[Event]:
        """As the real one; of the events, only the last."""
        await self._serve(lease.address, job.request_id, only_if_room)
        yield _FINISHED

    def leave_answers(self) -> None:
        """Never called."""
        raise AssertionError("no gateway is lost in a simulation")

    def resume(self, *_: object, **__: object) -> AsyncGenerator[Event]:
        """Never called."""
        raise AssertionError("no gateway is lost in a simulation")


_FINISHED: Final = Finished(
    reason=FinishReason.LENGTH,
    usage=Usage(
        num_prompt_tokens=0,
        num_prefill_tokens=0,
        num_decode_prompt_tokens=0,
        num_new_tokens=0,
        kv_received_bytes=0,
        kv_effective_bytes=0,
        num_kv_streams=0,
    ),
    timings=Timings(queue_s=0.0, prefill_s=0.0, first_token_s=0.0, decode_s=0.0),
)


async def emit_nothing(event: Event) -> None:
    """Clients of a simulation read no events."""
