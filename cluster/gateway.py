"""The front door: check, tokenise, hand to a decode node, relay its events."""

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from cluster.node_registry import NodeRegistry
from cluster.tokenising import TextExtent, TokenisingThreads
from colm.clock import Clock, Deadline
from colm.errors import (
    CapacityExceeded,
    DeadlineExceeded,
    InvalidRequest,
    LeaseExpired,
    PeerUnavailable,
    UnknownModel,
)
from colm.events import Accepted, Queued, WaitsFor
from colm.line import Beat
from colm.model.config import ChainConfig
from colm.nodes import ClusterStatus, ModelStatus, Role
from colm.sampling import SamplingParams
from colm.text.tokenizer import Tokenizer
from colm.wire.channels import Channels
from colm.wire.messages import (
    cluster_status_to_pb,
    gateway_response,
    relay,
    sampling_from_pb,
    sampling_to_pb,
    token_id_pieces,
    token_ids_from_pb,
)
from colm.wire.outcome import Outcome
from colm.wire.prompt_stream import read_open
from colm.wire.security import Security
from colm.wire.status import answering
from colm.wire.v1 import decode_service_pb2 as decode_pb
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from colm.wire.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)

logger = logging.getLogger(__name__)

_MAX_LOST_LEASES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLease:
    """One decode node, ours for one request."""

    address: str
    lease_id: str


class DecodePool(Protocol):
    """Lends decode nodes."""

    def lease(self, *, beat: Beat) -> AbstractAsyncContextManager[DecodeLease]:
        """Borrow a node for one request, in order of asking.

        Raises:
            PeerUnavailable: none can be had.
            CapacityExceeded: too many wait already.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What the gateway must know of the model."""

    name: str
    config: ChainConfig
    tokenizer: Tokenizer | None
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayLimits:
    """What one request, and all together, may ask for."""

    max_document_bytes: int
    max_requests: int
    default_max_new_tokens: int
    max_new_tokens: int
    default_timeout_s: float
    min_prefill_tokens_per_s: float
    min_decode_tokens_per_s: float
    max_timeout_s: float

    def timeout_s(self, *, num_prompt_tokens: int, max_new_tokens: int) -> float:
        """Deadline of a request whose client set none: it grows with the work."""
        work_s = num_prompt_tokens / self.min_prefill_tokens_per_s + max_new_tokens / self.min_decode_tokens_per_s
        return min(self.default_timeout_s + work_s, self.max_timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A request's options, checked; the prompt is still to come."""

    prompt: str
    chat: bool | None
    num_chains: int
    max_new_tokens: int
    sampling: SamplingParams
    timeout_s: float | None
    """The client's own; None leaves it to the gateway, once the prompt's length is known."""


class GenerationService(GenerationServiceServicer):
    """Serves `Generate` and `GetClusterStatus`."""

    def __init__(
        self,
        *,
        model: ServedModel,
        limits: GatewayLimits,
        decode_pool: DecodePool,
        node_security: Security,
        registry: NodeRegistry,
        clock: Clock,
    ) -> None:
        self._model = model
        self._limits = limits
        self._decode_pool = decode_pool
        self._node_security = node_security
        self._to_decode_nodes = Channels(node_security)
        self._registry = registry
        self._clock = clock
        self._num_active = 0
        self._tokenising = TokenisingThreads()
        self._token_bound = None if model.tokenizer is None else model.tokenizer.bound

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        add_GenerationServiceServicer_to_server(self, server)

    async def close(self) -> None:
        """Close the channels to decode nodes, once the server has stopped."""
        await self._to_decode_nodes.close()

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """One request; see the .proto file."""
        async with answering(context, "generate"), self._admitted():
            plan = self._plan(await read_open(request_iterator), context.time_remaining())
            arrived_s = self._clock.now()
            timeout_s = self._limits.default_timeout_s if plan.timeout_s is None else plan.timeout_s
            try:
                async with asyncio.timeout(timeout_s) as running:
                    token_ids = await self._read_prompt(plan, request_iterator)
                    if plan.timeout_s is None:
                        timeout_s = self._limits.timeout_s(
                            num_prompt_tokens=len(token_ids), max_new_tokens=plan.max_new_tokens
                        )
                    deadline = Deadline(self._clock, arrived_s + timeout_s)
                    running.reschedule(asyncio.get_running_loop().time() + deadline.remaining_s())
                    await self._serve(plan, token_ids, timeout_s, deadline, context)
            except TimeoutError as err:
                raise DeadlineExceeded(f"timeout_s={timeout_s:g} is over and the answer is not complete") from err

    async def GetClusterStatus(
        self,
        request: pb.GetClusterStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> pb.GetClusterStatusResponse:
        """Models, nodes and load."""
        model = self._model
        served = ModelStatus(
            name=model.name,
            chains=model.config.chains,
            max_context_tokens=model.config.max_context,
            fingerprint=model.fingerprint,
            reads_text=model.tokenizer is not None,
        )
        status = ClusterStatus(
            models=(served,), nodes=tuple(self._registry.nodes()), num_active_requests=self._num_active
        )
        return cluster_status_to_pb(status)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self._num_active >= self._limits.max_requests:
            raise CapacityExceeded(f"{self._num_active} requests are inside the gateway already; try again later")
        self._num_active += 1
        try:
            yield
        finally:
            self._num_active -= 1

    def _plan(self, opened: pb.OpenGenerate, call_remaining_s: float | None) -> _Plan:
        model, limits = self._model, self._limits
        if opened.model not in ("", model.name):
            raise UnknownModel("model", opened.model, f"this cluster serves {model.name!r}")
        num_chains = opened.num_chains if opened.HasField("num_chains") else model.config.num_chains
        if not 1 <= num_chains <= model.config.num_chains:
            raise InvalidRequest("num_chains", num_chains, f"must be between 1 and {model.config.num_chains}")
        max_new_tokens = opened.max_new_tokens if opened.HasField("max_new_tokens") else limits.default_max_new_tokens
        if not 1 <= max_new_tokens <= limits.max_new_tokens:
            raise InvalidRequest("max_new_tokens", max_new_tokens, f"must be between 1 and {limits.max_new_tokens}")
        timeout_s = opened.timeout_s if opened.HasField("timeout_s") else None
        if timeout_s is not None:
            if not (math.isfinite(timeout_s) and timeout_s <= limits.max_timeout_s):
                raise InvalidRequest("timeout_s", timeout_s, f"must be at most {limits.max_timeout_s:g}")
            if timeout_s <= 0:
                raise DeadlineExceeded(f"timeout_s={timeout_s:g}: the deadline is past already; it must be above 0")
        if call_remaining_s is not None:
            timeout_s = call_remaining_s if timeout_s is None else min(timeout_s, call_remaining_s)
        sampling = sampling_from_pb(opened.sampling)
        if sampling.stop and model.tokenizer is None:
            raise InvalidRequest("stop", sampling.stop, f"model {model.name!r} has no tokenizer; use stop_token_ids")
        return _Plan(
            prompt=opened.prompt,
            chat=opened.chat if opened.HasField("chat") else None,
            num_chains=num_chains,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            timeout_s=timeout_s,
        )

    async def _read_prompt(self, plan: _Plan, requests: AsyncIterator[pb.GenerateRequest]) -> NDArray[np.int64]:
        document, extent = bytearray(), TextExtent(self._token_bound)
        pieces, num_ids = [np.empty(0, dtype=np.int64)], 0
        async for request in requests:
            match request.WhichOneof("part"):
                case "document":
                    document += request.document
                    if len(document) > (limit := self._limits.max_document_bytes):
                        raise InvalidRequest("document", f"over {limit} bytes", f"at most {limit} bytes")
                    extent.add(request.document)
                    self._check_extent(extent, plan)
                case "token_ids":
                    pieces.append(token_ids_from_pb(request.token_ids))
                    num_ids += len(pieces[-1])
                    if num_ids > (context := self._model.config.max_context):
                        raise InvalidRequest("token_ids", f"over {context} ids", f"at most {context}, the context")
                case part:
                    raise InvalidRequest("part", part, "only `document` or `token_ids` may follow `open`")
        if num_ids:
            if document or plan.prompt:
                raise InvalidRequest("token_ids", f"{num_ids} ids", "give either token ids or text, not both")
            token_ids = np.concatenate(pieces)
        else:
            token_ids = await self._tokenising.run(lambda check: self._tokenise(plan, document, check))
        self._check_prompt(token_ids, plan)
        return token_ids

    def _check_extent(self, extent: TextExtent, plan: _Plan) -> None:
        """Refuse a document that cannot fit whatever it says, before the rest of it arrives."""
        if self._token_bound is None:
            return
        limit = self._max_prompt_tokens(plan) * self._token_bound.max_token_bytes
        if extent.num_bytes > limit:
            longest = f"no token stands for more than {self._token_bound.max_token_bytes} bytes"
            fit = f"at most {limit} bytes: {self._must_fit(plan)}, and {longest}"
            raise InvalidRequest("document", f"over {limit} bytes", fit)

    def _tokenise(self, plan: _Plan, document: bytearray, check_wanted: Callable[[], None]) -> NDArray[np.int64]:
        tokenizer = self._model.tokenizer
        if not document and not plan.prompt:
            raise InvalidRequest("prompt", "", "document and prompt must not both be empty")
        if tokenizer is None:
            raise InvalidRequest("prompt", plan.prompt, f"model {self._model.name!r} has no tokenizer; send token_ids")
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as err:
            shown = bytes(document[err.start : err.start + 8])
            raise InvalidRequest(
                "document", shown, f"must be UTF-8; byte {err.start} breaks it ({err.reason})"
            ) from err
        chat = tokenizer.has_chat_template if plan.chat is None else plan.chat

        def progress(num_tokens: int) -> None:
            check_wanted()
            self._check_length(num_tokens, plan)

        return tokenizer.encode_prompt(document=text, prompt=plan.prompt, chat=chat, progress=progress)

    def _check_prompt(self, token_ids: NDArray[np.int64], plan: _Plan) -> None:
        if not len(token_ids):
            raise InvalidRequest("prompt", "", "the prompt has no tokens")
        self._check_length(len(token_ids), plan)
        if (worst := int(token_ids.max())) >= (size := self._model.config.vocab_size):
            raise InvalidRequest("token_ids", worst, f"must be below the vocabulary size {size}")

    def _check_length(self, num_tokens: int, plan: _Plan) -> None:
        if num_tokens > (limit := self._max_prompt_tokens(plan)):
            raise InvalidRequest("document", f"over {limit} prompt tokens", self._must_fit(plan))

    def _max_prompt_tokens(self, plan: _Plan) -> int:
        return max(0, self._model.config.max_context - plan.max_new_tokens)

    def _must_fit(self, plan: _Plan) -> str:
        context = self._model.config.max_context
        return f"prompt and max_new_tokens={plan.max_new_tokens} must fit the model's context of {context}"

    async def _serve(
        self,
        plan: _Plan,
        token_ids: NDArray[np.int64],
        timeout_s: float,
        deadline: Deadline,
        context: grpc.aio.ServicerContext,
    ) -> None:
        request_id = secrets.token_hex(8)
        logger.info("request.accepted request=%s prompt_tokens=%d", request_id, len(token_ids))
        accepted = Accepted(
            request_id=request_id,
            model=self._model.name,
            num_prompt_tokens=len(token_ids),
            num_chains=plan.num_chains,
            max_new_tokens=plan.max_new_tokens,
            timeout_s=timeout_s,
        )
        await context.write(gateway_response(accepted))

        async def beat(num_ahead: int) -> None:
            await context.write(gateway_response(Queued(waits_for=WaitsFor.DECODE_NODE, num_ahead=num_ahead)))

        # Each node is asked once for room at once; only then does the request take its place in the line of one.
        refusals_left = max(1, self._registry.count(Role.DECODE)) - 1
        lost_leases_left = _MAX_LOST_LEASES
        while True:
            try:
                async with self._decode_pool.lease(beat=beat) as lease:
                    only_if_room = refusals_left > 0
                    return await self._relay(plan, request_id, token_ids, deadline, lease, only_if_room, context)
            except CapacityExceeded:
                if not refusals_left:
                    raise
                refusals_left -= 1
            except LeaseExpired:
                if not lost_leases_left:
                    raise
                lost_leases_left -= 1

    async def _relay(
        self,
        plan: _Plan,
        request_id: str,
        token_ids: NDArray[np.int64],
        deadline: Deadline,
        lease: DecodeLease,
        only_if_room: bool,
        context: grpc.aio.ServicerContext,
    ) -> None:
        opened = decode_pb.OpenDecode(
            request_id=request_id,
            num_chains=plan.num_chains,
            max_new_tokens=plan.max_new_tokens,
            sampling=sampling_to_pb(plan.sampling),
            num_prompt_tokens=len(token_ids),
            lease_id=lease.lease_id,
            only_if_room=only_if_room,
        )

        async def requests() -> AsyncIterator[decode_pb.DecodeRequest]:
            yield decode_pb.DecodeRequest(open=opened)
            for piece in token_id_pieces(token_ids):
                yield decode_pb.DecodeRequest(token_ids=piece)

        finished = False
        async with self._to_decode_nodes.use(lease.address) as channel:
            call = DecodeServiceStub(channel).Decode(
                requests(), metadata=self._node_security.metadata(), timeout=deadline.remaining_s()
            )
            try:
                with Outcome(call).errors(f"decode node {lease.address}"):
                    async for message in call:
                        finished = message.WhichOneof("event") == "finished"
                        if (response := relay(message)) is not None:
                            await context.write(response)
            finally:
                call.cancel()
        if not finished:
            raise PeerUnavailable(
                f"decode node {lease.address} ended the answer before it was finished; submit it again"
            )
