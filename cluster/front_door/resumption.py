"""Finds the decode node that holds an answer whose gateway was lost, and relays the rest of it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from cluster.front_door.placement import DecodeNodeCalls, Emit, whole
from cluster.front_door.plan import ServedModel
from cluster.node_registry import NodeRegistry
from colm import tracing
from colm.clock import Clock, Deadline
from colm.errors import PeerUnavailable, UnknownAnswer
from colm.events import Accepted, Event, Reserved, Resumed, ScaleChanged
from colm.nodes import REPORT_INTERVAL_S, NodeReport, Role
from colm.scale import Changing, Scale

logger = logging.getLogger(__name__)

SEARCH_S = 5.0
"""How long a gateway waits for the reports of decode nodes: it knows none when it has just begun."""
FIRST_WORD_S = 2.0
"""How long a decode node that is asked may take; one that hangs does not keep the others from being asked."""


class Resumption:
    """Asks the decode nodes one after the other, those that report later too.

    Args:
        models: those that decode nodes serve, by `NodeReport.variant`.
        num_decode_nodes: how many there are when all run; nobody waits for more.
    """

    def __init__(
        self,
        calls: DecodeNodeCalls,
        registry: NodeRegistry,
        clock: Clock,
        *,
        models: Mapping[str, ServedModel],
        num_decode_nodes: int,
    ) -> None:
        self._models = models
        self._calls = calls
        self._registry = registry
        self._clock = clock
        self._num_decode_nodes = num_decode_nodes

    async def run(
        self,
        answer_key: str,
        num_tokens: int,
        *,
        found: asyncio.Future[ServedModel],
        scale: Changing[Scale | None],
        deadline: Deadline,
        emit: Emit,
    ) -> None:
        """Emit `Accepted`, then the events of an answer behind its first `num_tokens` tokens; `Finished` is the last.

        Args:
            answer_key: as decode nodes know it.
            num_tokens: of the answer that the client has.
            found: gets the model that answers, once that is known.
            scale: what the client wants instead of what the answer has; None until it says so.
            deadline: when the answer must be complete.
            emit: takes the events.

        Raises:
            UnknownAnswer: no decode node holds it.
            PeerUnavailable: the node that holds it was lost.
            ColmError: whatever else the request fails with.
        """
        search = Deadline.after(self._clock, SEARCH_S)
        asked: set[str] = set()
        while True:
            nodes = [
                node.report
                for node in self._registry.nodes()
                if node.report.role is Role.DECODE and node.report.variant in self._models
            ]
            for node in nodes:
                if node.replica_id not in asked:
                    asked.add(node.replica_id)
                    call = self._calls.resume(node.address, answer_key, num_tokens, scale=scale, deadline=deadline)
                    if await self._relay(call, node, num_tokens, found, emit):
                        return
            if len(asked) >= self._num_decode_nodes or search.remaining_s() <= 0:
                raise UnknownAnswer("no decode node holds that answer any more; submit the request again")
            await asyncio.sleep(REPORT_INTERVAL_S / 5)

    async def _relay(
        self,
        call: AsyncGenerator[Event],
        node: NodeReport,
        num_tokens: int,
        found: asyncio.Future[ServedModel],
        emit: Emit,
    ) -> bool:
        """Relay the answer if the node that is called holds it; returns whether it does."""
        address, model = node.address, self._models[node.variant]
        async with aclosing(whole(call, address)) as events:
            try:
                async with asyncio.timeout(FIRST_WORD_S):
                    resumed = await anext(events)
            except (UnknownAnswer, PeerUnavailable, TimeoutError) as err:
                logger.info("answer.not_held address=%s cause=%r", address, err)
                return False
            if not isinstance(resumed, Resumed):
                raise PeerUnavailable(f"decode node {address} broke the protocol: {type(resumed).__name__} came first")
            if not found.done():
                found.set_result(model)
            logger.info("request.resumed request=%s tokens=%d", resumed.request_id, num_tokens)
            await emit(
                Accepted(
                    request_id=resumed.request_id,
                    model=model.name,
                    num_prompt_tokens=resumed.num_prompt_tokens,
                    num_chains=resumed.num_chains,
                    max_new_tokens=resumed.max_new_tokens,
                    timeout_s=resumed.remaining_s,
                    trace_id=tracing.trace_id(),
                    revision=model.revision,
                )
            )
            async for event in events:
                if not isinstance(event, Reserved | ScaleChanged):
                    await emit(event)
        return True
