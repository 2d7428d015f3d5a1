"""A cluster of simulated nodes behind the real placement and lenders, under one workload.

Real: `cluster.front_door.placement` with its refusals, `cluster.replicas.lender` in both pools, and what the nodes use.
Modelled: Ray Serve (`serve_model`), engines (`costs`), the network (`network`), and a fixed time on the way in and out
of the gateway. Node reports are as fresh as the real ones.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from bench.simulate.costs import Costs
from bench.simulate.decode_model import DecodeLimits, DecodeModel, Gaps
from bench.simulate.gateway_model import Calls, Reports, emit_nothing
from bench.simulate.prefill_model import PrefillLimits, PrefillModel
from bench.simulate.processor import OwnProcessor, Processor, SharedProcessor
from bench.simulate.requests import SimRequest
from bench.simulate.serve_model import ServeModel
from bench.simulate.virtual_time import LoopClock, simulate
from cluster.front_door.placement import RETRY, DecodeJob, Placement
from cluster.replicas.decode import ServePrefillPool
from cluster.replicas.gateway import ServeDecodePool
from colm.clock import Deadline
from colm.errors import CapacityExceeded
from colm.model.config import ChainConfig
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale

_DEADLINE_S: Final = 1e9
_SAMPLING: Final = SamplingParams()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterPlan:
    """A cluster to simulate."""

    config: ChainConfig
    num_prefill: int
    num_decode: int
    prefill: PrefillLimits
    decode: DecodeLimits
    link_bytes_per_s: float
    max_streams: int
    """Prompts that a prefill node is lent for."""
    max_requests: int
    """In the gateway; also those that may wait for a decode node."""
    lease_s: float = 0.0
    """What asking Serve takes."""
    gateway_s: float = 0.0
    """From the client to the decode node and back, all of it before the request is placed."""
    contention: float | None = None
    """Of one processor that all nodes share; None where each has its own."""

    @property
    def num_replicas(self) -> int:
        """Of both pools."""
        return self.num_prefill + self.num_decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """What came of a workload."""

    requests: Sequence[SimRequest]
    gaps: Gaps
    seconds: float
    """Until the last one ended."""
    prefill_busy: float
    """Share of the prefill engines' time until the last arrival."""
    decode_busy: float
    decode_batch: float
    """Answers in a step, on average."""
    page_use: float
    """Share of all decode nodes' pages, on average."""


def run(
    plan: ClusterPlan, costs: Costs, requests: Iterable[SimRequest], *, seed: int, ended: Callable[[], None]
) -> Simulated:
    """Simulate a workload to the end of its last request.

    Args:
        plan: the cluster.
        costs: of its engines.
        requests: by time of arrival.
        seed: of Serve's choices.
        ended: called as each request ends.
    """
    return simulate(_run(plan, costs, list(requests), seed, ended))


async def _run(
    plan: ClusterPlan, costs: Costs, requests: Sequence[SimRequest], seed: int, ended: Callable[[], None]
) -> Simulated:
    cluster = SimulatedCluster(plan, costs, Random(seed))
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def one(request: SimRequest) -> None:
        await cluster.serve(request)
        ended()

    all_ended = loop.create_future()

    def left(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if (error := task.exception()) is not None and not all_ended.done():
            all_ended.set_exception(error)
        elif not tasks and not all_ended.done() and has_all_come[0]:
            all_ended.set_result(None)

    has_all_come = [not requests]
    coming = iter(requests)

    def arrive(request: SimRequest) -> None:
        task = loop.create_task(one(request))
        tasks.add(task)
        task.add_done_callback(left)
        if (following := next(coming, None)) is None:
            has_all_come[0] = True
        else:
            loop.call_at(following.at_s, arrive, following)

    if (first := next(coming, None)) is not None:
        loop.call_at(first.at_s, arrive, first)
        await all_ended
    cluster.close()
    return cluster.result(requests)


class SimulatedCluster:
    """The gateway and both pools. Lives on the simulation's loop.

    Args:
        plan: what there is.
        costs: of the engines.
        rng: Serve's.
    """

    def __init__(self, plan: ClusterPlan, costs: Costs, rng: Random) -> None:
        self._plan = plan
        self._costs = costs
        self._loop = asyncio.get_running_loop()
        clock = LoopClock(self._loop)
        self._gaps = Gaps()
        shared = None if plan.contention is None else SharedProcessor(plan.contention)
        self._new_processor: Callable[[], Processor] = OwnProcessor if shared is None else lambda: shared
        self._prefill_serve = ServeModel(max_ongoing=plan.max_streams, lease_s=plan.lease_s, rng=rng)
        self._decode_serve = ServeModel(max_ongoing=plan.decode.max_requests, lease_s=plan.lease_s, rng=rng)
        self.prefill_nodes: dict[str, PrefillModel] = {}
        self.decode_nodes: dict[str, DecodeModel] = {}
        self._pools: list[ServePrefillPool] = []
        for number in range(plan.num_prefill):
            self._add_prefill(f"p{number}")
        for number in range(plan.num_decode):
            self._add_decode(f"d{number}")
        self._decode_pool = ServeDecodePool(self._decode_serve, max_waiting=plan.max_requests)
        self._registry = Reports(clock, self.decode_nodes)
        self._placement = Placement(
            self._decode_pool, Calls(self._decode), self._registry, clock, RETRY, lambda _: None
        )
        self._deadline = Deadline(clock, _DEADLINE_S)
        self._inside: dict[str, SimRequest] = {}

    async def serve(self, request: SimRequest) -> None:
        """Serve a request to its one end."""
        if len(self._inside) >= self._plan.max_requests:
            request.error = "CapacityExceeded: the gateway is full"
            return
        self._inside[request.name] = request
        job = DecodeJob(
            request_id=request.name,
            # Prompts share nothing: each one's number stands for it.
            token_ids=np.array([request.number], dtype=np.int64),
            scale=Changing(Scale(num_chains=request.num_chains, min_chains=request.num_chains)),
            max_new_tokens=request.num_new_tokens,
            sampling=_SAMPLING,
            attention="dense",
            kv_codec="raw",
            max_draft_tokens=0,
        )
        try:
            await asyncio.sleep(self._plan.gateway_s)
            await self._placement.run(job, self._deadline, emit_nothing)
        except CapacityExceeded as err:
            request.error = f"CapacityExceeded: {err}"
        finally:
            del self._inside[request.name]

    async def _decode(self, address: str, request_id: str, only_if_room: bool) -> None:
        await self.decode_nodes[address].serve(self._inside[request_id], only_if_room=only_if_room)

    def close(self) -> None:
        """Give back what is lent."""
        self._decode_pool.close()
        for pool in self._pools:
            pool.close()

    def result(self, requests: Sequence[SimRequest]) -> Simulated:
        """What has come of it; every page is free again.

        Raises:
            AssertionError: a page or a request was lost.
        """
        assert not self._inside, "a request has not ended"
        for node in self.decode_nodes.values():
            assert node.page_line.pool.num_free == node.page_line.pool.num_pages, "a page was lost"
            assert node.num_requests == 0, "a request was counted out wrongly"
        seconds = self._loop.time()
        prefill, decode = list(self.prefill_nodes.values()), list(self.decode_nodes.values())
        num_steps = sum(each.counts.num_steps for each in decode)
        return Simulated(
            requests=requests,
            gaps=self._gaps,
            seconds=seconds,
            prefill_busy=_share(sum(each.counts.engine_s for each in prefill), seconds * len(prefill)),
            decode_busy=_share(sum(each.counts.engine_s for each in decode), seconds * len(decode)),
            decode_batch=_share(sum(each.counts.num_tokens for each in decode), num_steps),
            page_use=_share(
                sum(each.counts.page_s for each in decode), seconds * len(decode) * self._plan.decode.num_pages
            ),
        )

    def _add_prefill(self, address: str) -> None:
        self.prefill_nodes[address] = PrefillModel(
            address,
            self._plan.config,
            self._costs,
            self._plan.prefill,
            processor=self._new_processor(),
            bytes_per_s=self._plan.link_bytes_per_s,
        )
        self._prefill_serve.add(address)

    def _add_decode(self, address: str) -> None:
        pool = ServePrefillPool(
            self._prefill_serve,
            num_replicas=self._plan.num_prefill,
            max_waiting=self._plan.prefill.max_queued,
            is_alone=self._plan.num_decode == 1,
        )
        self._pools.append(pool)
        self.decode_nodes[address] = DecodeModel(
            address,
            self._costs,
            self._plan.decode,
            pool,
            self.prefill_nodes,
            processor=self._new_processor(),
            bytes_per_s=self._plan.link_bytes_per_s,
            gaps=self._gaps,
        )
        self._decode_serve.add(address)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
