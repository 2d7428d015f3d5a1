"""Assembles a decode node: weights, pages, loop, service and server. It runs with or without a cluster."""

import asyncio
import logging
from dataclasses import dataclass, field

import grpc
from prometheus_client import CollectorRegistry

from colm import defaults
from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.kv import KvFormat, fingerprint
from colm.leases import LeaseTable
from colm.metrics.kv_stream import KvStreamMetrics
from colm.model import parameter_shapes
from colm.model.weights import WeightLayout
from colm.placement import Placement
from colm.retry import RetryPolicy
from colm.text.tokenizer import Tokenizer
from colm.watch import Watch
from colm.wire.channels import BlockingChannels
from colm.wire.endpoint import bind, create_server, dial_address
from colm.wire.security import Security
from colm.wire.shared_memory import host_id
from decode_node.auto_scale import AutoScale
from decode_node.decode_loop import DecodeLoop
from decode_node.drafter import Drafting, StepTimes
from decode_node.engine import DecodeEngine
from decode_node.first_steps import measured
from decode_node.grammar import Grammars
from decode_node.held_answers import HeldAnswers
from decode_node.kv_fetch import KvFetcher, KvTransfer
from decode_node.kv_layout import KvLayout
from decode_node.kv_receiver import KvReceiver
from decode_node.kv_store import KvStore
from decode_node.metrics import DecodeMetrics
from decode_node.page_line import PageLine
from decode_node.page_pool import PagePool
from decode_node.prefill_pool import PrefillLease, PrefillPool
from decode_node.prompt_blocks import PromptBlocks
from decode_node.requests import RequestOwner, Stage
from decode_node.service import DecodeService
from decode_node.settings import DecodeSettings
from decode_node.step_budget import StepBudget

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """How to run one decode node."""

    model_path: str
    """Checkpoint directory; all chains are read."""
    placement: Placement
    """Its device, dtype and CPU threads."""
    settings: DecodeSettings = field(default_factory=DecodeSettings)
    """How it works."""
    prefill_tile_tokens: int = defaults.TILE_TOKENS
    """Of the prefill nodes' tiles, until one says."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 picks a free port."""


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """How busy the node is."""

    num_active: int
    num_queued: int
    num_pages_total: int
    num_pages_used: int
    num_prefilling: int
    """Of those that are queued."""
    num_pages_prefilling: int
    """Of those that are used."""
    num_pages_wanted: int
    num_places: int


class DecodeNode:
    """A decode node. Create it on the event loop, then `start` it; end it with `stop`.

    Args:
        leases: the leases that callers must hold; None serves any caller with the token.
    """

    def __init__(
        self,
        options: DecodeOptions,
        security: Security,
        prefill_pool: PrefillPool,
        leases: LeaseTable | None = None,
    ) -> None:
        self._options = options
        self._leases = leases
        self._security = security
        self._prefill_pool = prefill_pool
        self._to_prefill_nodes = BlockingChannels(security)
        self._server: grpc.aio.Server = create_server(security)
        self._loop_task: asyncio.Task[None] | None = None
        self.address = ""
        self.fingerprint = ""
        self.owner: RequestOwner
        self.answers: HeldAnswers
        self.page_line: PageLine
        self._fetcher: KvFetcher | None = None
        self.metrics = CollectorRegistry()

    @property
    def load(self) -> DecodeLoad:
        """Requests that decode, requests that wait or prefill, pages, and answers that a step advances."""
        stages, pool = self.owner.stages(), self.page_line.pool
        return DecodeLoad(
            num_active=stages[Stage.DECODING],
            num_queued=stages[Stage.WAITING] + stages[Stage.PREFILLING],
            num_pages_total=pool.num_pages,
            num_pages_used=pool.num_used,
            num_prefilling=stages[Stage.PREFILLING],
            num_pages_prefilling=min(self.owner.num_pages_of(Stage.PREFILLING), pool.num_used),
            num_pages_wanted=self.owner.num_pages_of(Stage.WAITING),
            num_places=self._options.settings.max_batch_size,
        )

    async def start(self) -> None:
        """Load all chains and listen.

        Raises:
            CheckpointError: the checkpoint cannot be served.
            ConfigError: the KV cache is smaller than a page, or the device is not there.
            OSError: the port is taken, or the host is not this machine's.
        """
        options, settings, clock = self._options, self._options.settings, MonotonicClock()
        checkpoint, tokenizer, store, engine = await asyncio.to_thread(_load, options)
        at_start, step_tokens = None, settings.step_tokens
        if step_tokens is None:
            drafts = settings.max_draft_tokens > 0
            at_start = await asyncio.to_thread(measured, engine, store, clock, drafts=drafts)
            step_tokens = at_start.num_riding
        self.fingerprint = await asyncio.to_thread(fingerprint, checkpoint, store.layout.kv_format)
        layout, shares = store.layout, settings.prefix_cache_bytes > 0
        self.page_line = PageLine(
            PagePool(store.num_pages),
            max_waiting=settings.max_requests,
            max_idle_pages=settings.prefix_cache_bytes // layout.page_bytes,
        )
        budget = StepBudget(step_tokens=step_tokens, max_tokens=engine.max_exact_tokens)
        times = StepTimes.of(
            checkpoint.config,
            max_tokens=engine.max_exact_tokens,
            budget=budget,
            draft_share=engine.draft_share,
            at_start=at_start,
        )
        drafting = Drafting(times, settings.max_draft_tokens) if settings.max_draft_tokens else None
        loop = DecodeLoop(
            engine,
            self.page_line,
            max_batch_size=settings.max_batch_size,
            budget=budget,
            auto_scale=AutoScale(times.num_weights),
            times=times if drafting else None,
        )
        self._loop_task = asyncio.create_task(loop.run(), name="decode-loop")

        def receive(transfer: KvTransfer, lease: PrefillLease) -> KvReceiver:
            return KvReceiver(transfer, lease, store, self._to_prefill_nodes, self._security, clock, host_id())

        self._fetcher = KvFetcher(
            prefill_pool=self._prefill_pool,
            receive=receive,
            page_line=self.page_line,
            fingerprint=self.fingerprint,
            num_layers=layout.kv_format.num_layers,
            max_transfers=settings.max_requests,
            clock=clock,
            retry=RetryPolicy(),
            metrics=KvStreamMetrics(self.metrics),
            tile_tokens=options.prefill_tile_tokens,
        )
        self.owner = RequestOwner(
            page_line=self.page_line,
            store=store,
            fetcher=self._fetcher,
            loop=loop,
            tokenizer=tokenizer,
            grammars=Grammars(tokenizer, checkpoint.config.vocab_size),
            eos_token_ids=checkpoint.text.eos_token_ids,
            max_requests=settings.max_requests,
            max_local_prefill_tokens=settings.max_local_prefill_tokens,
            drafting=drafting,
            blocks=PromptBlocks(layout=layout, fingerprint=self.fingerprint) if shares else None,
            clock=clock,
        )
        self.answers = HeldAnswers(self.owner, settings.orphan_s)
        self._watch = Watch(clock, lambda: loop.mark)
        DecodeMetrics(self.owner, self.answers, loop, self.page_line, store.layout, self.metrics)
        DecodeService(self.answers, checkpoint.config, clock, self._leases).add_to(self._server)
        port = bind(self._server, options.host, options.port, self._security)
        await self._server.start()
        self.address = dial_address(options.host, port)
        logger.info(
            "decode.ready address=%s device=%s pages=%d page_format=%s weights=%s weight_bytes=%d step_tokens=%d "
            "fingerprint=%s",
            self.address,
            options.placement.device,
            store.num_pages,
            store.layout.page_format,
            settings.weights,
            engine.weight_bytes(checkpoint.config.num_chains),
            step_tokens,
            self.fingerprint[:16],
        )

    @property
    def is_healthy(self) -> bool:
        """Whether the decode loop is running, and answers go on."""
        return self._loop_task is not None and not self._loop_task.done() and self._watch.goes_on()

    async def stop(self) -> None:
        """Let running requests end within `STOP_GRACE_S` seconds, then cancel them."""
        await self._server.stop(defaults.STOP_GRACE_S)
        if self._loop_task is not None:
            await self.answers.close()
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])
        if self._fetcher is not None:
            await self._fetcher.stop()
        self._to_prefill_nodes.close()

    async def serve(self) -> None:
        """Wait until stopped."""
        await self._server.wait_for_termination()


def _load(options: DecodeOptions) -> tuple[Checkpoint, Tokenizer | None, KvStore, DecodeEngine]:
    placement, settings = options.placement, options.settings
    placement.take()
    checkpoint = Checkpoint.open(options.model_path)
    checkpoint.require_finite(parameter_shapes(checkpoint.config))
    kv_format = KvFormat.of(checkpoint.config, placement.dtype)
    layout = KvLayout(kv_format, settings.page_tokens, settings.kv_cache_dtype)
    store = KvStore(layout, layout.pages_within(settings.kv_cache_bytes), placement.device)
    weights = WeightLayout(
        dtype=placement.dtype,
        quantisation=None if settings.weights == "stored" else settings.weights,
        quantise_kv_projections=settings.quantise_kv_projections,
    )
    draft_weights = None if settings.draft_weights == "stored" else settings.draft_weights
    if settings.max_draft_tokens == 0:
        draft_weights = None
    engine = DecodeEngine(checkpoint, store, weights=weights, draft_weights=draft_weights)
    return checkpoint, Tokenizer.load(checkpoint), store, engine
