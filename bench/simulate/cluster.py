"""A cluster of simulated nodes behind the real placement and lenders, under one workload.

Real: `cluster.front_door.placement` with its refusals, `cluster.replicas.lender` in both pools, and what the nodes use.
Modelled: Ray Serve (`serve_model`), engines (`costs`), the network (`network`), and a fixed time on the way in and out
of the gateway. Node reports are as fresh as the real ones.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Final

import numpy as np

from bench.simulate.costs import Costs
from bench.simulate.decode_model import DecodeLimits, DecodeModel, Gaps
from bench.simulate.gateway_model import Calls, Reports, emit_nothing
from bench.simulate.prefill_model import PrefillLimits, PrefillModel
from bench.simulate.processor import Contention, Cores, OwnProcessor, Processor, SharedProcessor
from bench.simulate.requests import SimRequest
from bench.simulate.scaling import Look, ScalingPlan, SimulatedNumbers, scale
from bench.simulate.serve_model import ServeModel
from bench.simulate.virtual_time import LoopClock, simulate
from cluster.front_door.placement import RETRY, DecodeJob, Placement
from cluster.replicas.decode import ServePrefillPool
from cluster.replicas.decode_pool import ServeDecodePool
from colm.clock import Deadline
from colm.errors import CapacityExceeded
from colm.model.config import ChainConfig
from colm.nodes import NodeCounts, Role
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale

Ended = Callable[[SimRequest], None]
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
    scaling: ScalingPlan | None = None
    """None where the numbers of replicas stay."""
    contention: Contention | None = None
    """On cores that all nodes share; None where each node has its own."""

    def of(self, num_prefill: int, num_decode: int, link_bytes_per_s: float) -> "ClusterPlan":
        """The same with other numbers; the gateway takes as many requests as all decode nodes that may be there."""
        pools = () if self.scaling is None else self.scaling.pools
        most = [each.limits.max_replicas for each in pools if each.role is Role.DECODE]
        max_requests = max([num_decode, *most]) * self.decode.max_requests
        return replace(
            self,
            num_prefill=num_prefill,
            num_decode=num_decode,
            link_bytes_per_s=link_bytes_per_s,
            max_requests=max_requests,
        )


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
    looks: Sequence[Look] = ()
    """Of the autoscaler."""


def run(plan: ClusterPlan, costs: Costs, requests: Iterable[SimRequest], *, seed: int, ended: Ended) -> Simulated:
    """Simulate a workload to the end of its last request.

    Args:
        plan: the cluster.
        costs: of its engines.
        requests: by time of arrival.
        seed: of Serve's choices.
        ended: told of each request as it ends; what it raises ends the simulation.
    """
    return simulate(_run(plan, costs, list(requests), seed, ended))


async def _run(plan: ClusterPlan, costs: Costs, requests: Sequence[SimRequest], seed: int, ended: Ended) -> Simulated:
    cluster = SimulatedCluster(plan, costs, Random(seed))
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def one(request: SimRequest) -> None:
        await cluster.serve(request)
        ended(request)

    all_ended = loop.create_future()

    def left(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if task.cancelled():  # one of the others has failed
            return
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
        async with cluster.scaled():
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
        self._cores = Cores()
        self._prefill_serve = ServeModel(max_ongoing=plan.max_streams, lease_s=plan.lease_s, rng=rng)
        self._decode_serve = ServeModel(max_ongoing=plan.decode.max_requests, lease_s=plan.lease_s, rng=rng)
        self.prefill_nodes: dict[str, PrefillModel] = {}
        self.decode_nodes: dict[str, DecodeModel] = {}
        # The nodes that take something new, in the order in which they came, and when they did.
        self._serving_prefill: dict[str, PrefillModel] = {}
        self._serving_decode: dict[str, DecodeModel] = {}
        self._since_s: dict[str, float] = {}
        self._served_s = dict.fromkeys(Role, 0.0)
        self._looks: list[Look] = []
        self._pools: list[ServePrefillPool] = []
        for _ in range(plan.num_prefill):
            self._add(Role.PREFILL)
        for _ in range(plan.num_decode):
            self._add(Role.DECODE)
        self._decode_pool = ServeDecodePool(self._decode_serve, max_waiting=plan.max_requests)
        self._clock = clock
        self._registry = Reports(clock, self._serving_prefill, self._serving_decode, has_all=plan.scaling is not None)
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

    @asynccontextmanager
    async def scaled(self) -> AsyncIterator[None]:
        """Let the pools follow their load, if they do, as long as the block lasts."""
        if self._plan.scaling is None:
            yield
            return
        numbers = SimulatedNumbers(self._num_serving, self._add, self._retire, self._plan.scaling.start_s)
        scaling = asyncio.ensure_future(
            scale(
                self._plan.scaling,
                self._registry,
                numbers,
                self._clock,
                lambda: self._decode_pool.num_waiting,
                self._looks,
            )
        )
        try:
            yield
        finally:
            scaling.cancel()

    def result(self, requests: Sequence[SimRequest]) -> Simulated:
        """What has come of it; every page is free again.

        Raises:
            AssertionError: a page or a request was lost.
        """
        assert not self._inside, "a request has not ended"
        for node in self.decode_nodes.values():
            assert node.page_line.pool.num_free == node.page_line.pool.num_pages, "a page was lost"
            assert node.num_requests == 0, "a request was counted out wrongly"
        for role, serving in ((Role.PREFILL, self._serving_prefill), (Role.DECODE, self._serving_decode)):
            self._served_s[role] += sum(self._loop.time() - self._since_s[address] for address in serving)
        prefill, decode = list(self.prefill_nodes.values()), list(self.decode_nodes.values())
        num_steps = sum(each.counts.num_steps for each in decode)
        return Simulated(
            requests=requests,
            gaps=self._gaps,
            seconds=self._loop.time(),
            prefill_busy=_share(sum(each.counts.engine_s for each in prefill), self._served_s[Role.PREFILL]),
            decode_busy=_share(sum(each.counts.engine_s for each in decode), self._served_s[Role.DECODE]),
            decode_batch=_share(sum(each.counts.num_tokens for each in decode), num_steps),
            page_use=_share(
                sum(each.counts.page_s for each in decode), self._served_s[Role.DECODE] * self._plan.decode.num_pages
            ),
            looks=self._looks,
        )

    def _processor(self) -> Processor:
        contention = self._plan.contention
        return OwnProcessor() if contention is None else SharedProcessor(self._cores, contention)

    def _num_serving(self, role: Role) -> int:
        return len(self._serving_prefill if role is Role.PREFILL else self._serving_decode)

    def _add(self, role: Role) -> None:
        if role is Role.PREFILL:
            self._add_prefill(address := f"p{len(self.prefill_nodes)}")
        else:
            self._add_decode(address := f"d{len(self.decode_nodes)}")
        self._since_s[address] = self._loop.time()

    def _retire(self, role: Role) -> None:
        if role is Role.PREFILL:
            address, _ = self._serving_prefill.popitem()
            self._prefill_serve.retire(address)
        else:
            address, _ = self._serving_decode.popitem()
            self._decode_serve.retire(address)
        self._served_s[role] += self._loop.time() - self._since_s[address]

    def _add_prefill(self, address: str) -> None:
        self.prefill_nodes[address] = self._serving_prefill[address] = PrefillModel(
            address,
            self._plan.config,
            self._costs,
            self._plan.prefill,
            processor=self._processor(),
            bytes_per_s=self._plan.link_bytes_per_s,
        )
        self._prefill_serve.add(address)

    def _add_decode(self, address: str) -> None:
        pool = ServePrefillPool(self._prefill_serve, max_waiting=self._plan.prefill.max_queued)
        pool.hear(NodeCounts(num_prefill=self._plan.num_prefill, num_decode=self._plan.num_decode))
        self._pools.append(pool)
        self.decode_nodes[address] = self._serving_decode[address] = DecodeModel(
            address,
            self._costs,
            self._plan.decode,
            pool,
            self.prefill_nodes,
            processor=self._processor(),
            bytes_per_s=self._plan.link_bytes_per_s,
            gaps=self._gaps,
        )
        self._decode_serve.add(address)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
