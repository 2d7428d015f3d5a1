"""Takes a request through the gateway: admits, checks and tokenises it, places it, and relays its answer."""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cluster.front_door.placement import RETRY, DecodeJob, DecodeNodeCalls, DecodePool, Emit, Placement
from cluster.front_door.plan import GatewayLimits, Plan, ServedModel
from cluster.front_door.prompt import PromptPart, PromptReader
from cluster.front_door.pulled import pulled
from cluster.front_door.resumption import Resumption
from cluster.node_registry import NodeRegistry
from colm import tracing
from colm.beside import beside
from colm.clock import Clock, Deadline
from colm.errors import CapacityExceeded, ColmError, DeadlineExceeded, GoingAway, InvalidRequest, UnknownModel
from colm.events import Accepted, Event, ScaleChanged
from colm.nodes import ClusterStatus, ModelStatus
from colm.request import ANSWER_KEY, GenerateRequest
from colm.retry import RetryPolicy
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale, ScaleWish

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A further model that has the cluster's chain 1, on decode nodes of its own."""

    model: ServedModel
    decode_pool: DecodePool


class FrontDoor:
    """Serves requests in the project's own types; protocols are adapters in front of it.

    Args:
        model: the model that is served.
        limits: limits of each request, and of all together.
        decode_pool: lends decode nodes.
        calls: calls decode nodes.
        registry: knows the nodes that reported lately.
        clock: measures deadlines.
        num_decode_nodes: how many there are when all run, of all models.
        variants: further models, whose nodes report their names.
        retry: how often a decode node is called in vain.
        on_resubmit: told why a request is given to a decode node again.
        metrics_address: where Prometheus reads the gateway; empty where it does not.
    """

    def __init__(
        self,
        *,
        model: ServedModel,
        limits: GatewayLimits,
        decode_pool: DecodePool,
        calls: DecodeNodeCalls,
        registry: NodeRegistry,
        clock: Clock,
        num_decode_nodes: int = 1,
        variants: Sequence[Variant] = (),
        retry: RetryPolicy = RETRY,
        on_resubmit: Callable[[ColmError], None] = lambda _: None,
        metrics_address: str = "",
    ) -> None:
        self._limits = limits
        self._prompts = PromptReader(
            max_document_bytes=limits.max_document_bytes, max_upload_bytes=limits.max_upload_bytes
        )
        served = {"": Variant(model=model, decode_pool=decode_pool)} | {each.model.name: each for each in variants}
        self._models = {each.model.name: each.model for each in served.values()}
        self._placements = {
            each.model.name: Placement(each.decode_pool, calls, registry.serving(variant), clock, retry, on_resubmit)
            for variant, each in served.items()
        }
        self._resumption = Resumption(
            calls,
            registry,
            clock,
            models={variant: each.model for variant, each in served.items()},
            num_decode_nodes=num_decode_nodes,
        )
        self._registry = registry
        self._clock = clock
        self._calls = calls
        self._metrics_address = metrics_address
        self._running: set[asyncio.Timeout] = set()
        """One of each request that is inside, which ends it when it is rescheduled."""
        self._is_going = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, bound_s: float, before_handing_over: Callable[[], Awaitable[None]] | None = None) -> None:
        """Take no new request from now on, and wait for those that are inside; call it before the gateway ends.

        What is left at the bound is handed over: the client is told `GoingAway`, and the decode node keeps the answer
        for a client that asks the next gateway for it.

        Args:
            bound_s: longest wait.
            before_handing_over: called before anybody is told `GoingAway`.
        """
        self._is_going = True
        try:
            async with asyncio.timeout(bound_s):
                await self._idle.wait()
        except TimeoutError:
            if before_handing_over is not None:
                await before_handing_over()
            logger.info("gateway.hands_over requests=%d", len(self._running))
            self._calls.leave_answers()
            for left in self._running:
                if not left.expired():
                    left.reschedule(0)

    @property
    def is_going(self) -> bool:
        """It takes no new request."""
        return self._is_going

    def model_of(self, name: str) -> ServedModel:
        """The model of that name; the cluster's own if it is empty.

        Raises:
            UnknownModel: there is none.
        """
        found = self._models.get(name or next(iter(self._models)))
        if found is None:
            raise UnknownModel("model", name, f"this cluster serves {', '.join(map(repr, self._models))}")
        return found

    @asynccontextmanager
    async def generate(
        self,
        request: GenerateRequest,
        prompt: AsyncIterator[PromptPart],
        *,
        changes: AsyncIterator[ScaleWish] | None = None,
        owner: str = "",
        caller_waits_s: float | None = None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Serve one request: yields an iterator over its events, `Accepted` first and `Finished` last.

        The request lasts as long as the block, and counts towards `max_requests` until the block ends. The deadline
        cancels whatever the block waits for, the reader's own work included. However the block is left, no node works
        for the request any more.

        Args:
            request: the options.
            prompt: the document, or the whole prompt as token ids.
            changes: of the scale, which the client makes while the answer runs; read behind the prompt. Each is
                answered by `ScaleChanged`.
            owner: the client's name; no other client may resume the answer, or share a prompt's keys and values.
            caller_waits_s: seconds until the caller's own deadline; None without one.

        Raises:
            ColmError: why there is no answer; `InvalidRequest` names the field at fault.
        """
        async with self._admitted():
            with tracing.span("generate") as note:
                plan = Plan.of(request, self.model_of(request.model), self._limits, caller_waits_s)
                found = _known(plan.model)
                arrived_s = self._clock.now()
                timeout_s = self._limits.default_timeout_s if plan.timeout_s is None else plan.timeout_s

                async def serve(emit: Emit) -> None:
                    nonlocal timeout_s
                    with tracing.span("read_prompt"):
                        job = replace(
                            await self._read(plan, prompt, owner), answer_key=_owned(request.answer_key, owner)
                        )
                    note(request=job.request_id, prompt_tokens=len(job.token_ids), chains=job.scale.value.num_chains)
                    if plan.timeout_s is None:
                        timeout_s = self._limits.timeout_s(
                            num_prompt_tokens=len(job.token_ids), max_new_tokens=plan.max_new_tokens
                        )
                    deadline = Deadline(self._clock, arrived_s + timeout_s)
                    running.reschedule(asyncio.get_running_loop().time() + deadline.remaining_s())
                    await emit(_accepted(plan.model, job, timeout_s))
                    async with beside(_change(job.scale, changes, found, emit)):
                        await self._placements[plan.model.name].run(job, deadline, emit)

                try:
                    async with asyncio.timeout(timeout_s) as running, pulled(serve) as events:
                        yield events
                except TimeoutError as err:
                    if not running.expired():
                        raise
                    raise DeadlineExceeded(f"timeout_s={timeout_s:g} is over and the answer is not complete") from err

    @asynccontextmanager
    async def resume(
        self,
        answer_key: str,
        num_tokens: int,
        *,
        changes: AsyncIterator[ScaleWish] | None = None,
        owner: str = "",
        caller_waits_s: float | None = None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Go on with an answer whose gateway was lost: as `generate`, without the first `num_tokens` tokens.

        Raises:
            UnknownAnswer: it is not held any more, or is another client's.
            ColmError: why there is no answer.
        """
        if not ANSWER_KEY.fullmatch(answer_key):
            raise InvalidRequest("answer_key", answer_key, "must be 32 lower-case hex digits, as in the request")
        async with self._admitted():
            with tracing.span("resume"):
                longest_s = self._limits.max_timeout_s
                deadline = Deadline.after(
                    self._clock, longest_s if caller_waits_s is None else min(caller_waits_s, longest_s)
                )

                async def serve(emit: Emit) -> None:
                    key = _owned(answer_key, owner)
                    scale: Changing[Scale | None] = Changing(None)
                    found: asyncio.Future[ServedModel] = asyncio.get_running_loop().create_future()
                    async with beside(_change(scale, changes, found, emit)):
                        await self._resumption.run(
                            key, num_tokens, found=found, scale=scale, deadline=deadline, emit=emit
                        )

                async with pulled(serve) as events:
                    yield events

    def status(self) -> ClusterStatus:
        """Models, nodes and load."""
        models = tuple(
            ModelStatus(
                name=model.name,
                chains=model.config.chains,
                max_context_tokens=model.config.max_context,
                fingerprint=model.fingerprint,
                reads_text=model.tokenizer is not None,
            )
            for model in self._models.values()
        )
        nodes = tuple(self._registry.nodes())
        return ClusterStatus(
            models=models,
            nodes=nodes,
            num_active_requests=len(self._running),
            metrics_address=self._metrics_address,
            pools=self._registry.pools,
        )

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self._is_going:
            raise GoingAway("the gateway is stopping and takes no new requests; try again, another one may be there")
        if (num_active := len(self._running)) >= self._limits.max_requests:
            raise CapacityExceeded(f"{num_active} requests are inside the gateway already; try again later")
        left = asyncio.timeout(None)
        try:
            async with left:
                self._running.add(left)
                self._idle.clear()
                yield
        except TimeoutError as err:
            if not left.expired():
                raise
            raise GoingAway("the gateway is stopping, and this answer has not ended in time; ask again") from err
        finally:
            self._running.discard(left)
            if not self._running:
                self._idle.set()

    async def _read(self, plan: Plan, prompt: AsyncIterator[PromptPart], owner: str) -> DecodeJob:
        token_ids = await self._prompts.read(plan, prompt)
        return DecodeJob(
            request_id=secrets.token_hex(8),
            token_ids=token_ids,
            scale=Changing(plan.scale),
            max_new_tokens=plan.max_new_tokens,
            sampling=_with_seed(plan.sampling),
            attention=plan.attention,
            kv_codec=plan.kv_codec,
            max_draft_tokens=plan.max_draft_tokens,
            # How long a prompt takes must tell nobody what others have asked.
            cache_salt=hashlib.sha256(f"cache\0{owner}".encode()).digest(),
            provisional_first_token=plan.provisional_first_token,
            made_token_ids=plan.answer_token_ids,
        )


async def _change(
    scale: Changing[Scale] | Changing[Scale | None],
    wishes: AsyncIterator[ScaleWish] | None,
    found: asyncio.Future[ServedModel],
    emit: Emit,
) -> None:
    """Change the scale as the client wishes, once it is known which model answers."""
    if wishes is None:
        return
    async for wish in wishes:
        wanted = Scale.of(wish, (await found).config.num_chains)
        scale.change(wanted)
        await emit(ScaleChanged(num_chains=wanted.num_chains, min_chains=wanted.min_chains))


def _known(model: ServedModel) -> asyncio.Future[ServedModel]:
    found: asyncio.Future[ServedModel] = asyncio.get_running_loop().create_future()
    found.set_result(model)
    return found


def _accepted(model: ServedModel, job: DecodeJob, timeout_s: float) -> Accepted:
    logger.info("request.accepted request=%s prompt_tokens=%d", job.request_id, len(job.token_ids))
    return Accepted(
        request_id=job.request_id,
        model=model.name,
        num_prompt_tokens=len(job.token_ids),
        num_chains=job.scale.value.num_chains,
        max_new_tokens=job.max_new_tokens,
        timeout_s=timeout_s,
        trace_id=tracing.trace_id(),
        revision=model.revision,
    )


def _with_seed(sampling: SamplingParams) -> SamplingParams:
    """The same with a seed: a decode node that takes over must draw what the lost one would have drawn."""
    if sampling.temperature == 0 or sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbits(64))


def _owned(answer_key: str, owner: str) -> str:
    """What decode nodes know an answer by: a client that learns another one's key makes another name of it."""
    return hashlib.sha256(f"{owner}\0{answer_key}".encode()).hexdigest() if answer_key else ""
