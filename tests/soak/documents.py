"""Questions about four times more documents than all caches hold, to nodes in one process.

Documents are asked about as a Zipf law has it, several at a time, at every scale, with drafts, greedy and sampled; some
askers leave in the middle. Every answer must have the tokens of nodes that keep nothing. At each event no budget may be
exceeded, and no page that an answer reads may have changed; at the end nothing may be held.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import xxhash

from colm.checkpoint import Checkpoint
from colm.sampling import SamplingParams
from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.v1 import common_pb2
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from decode_node.kv_layout import KvLayout
from decode_node.node import DecodeNode
from decode_node.requests import Stage
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S
from tests.nodes import (
    PAGE_TOKENS,
    decode_node,
    decode_requests,
    pages_bytes,
    prefill_node,
    until_idle,
    until_prefill_idle,
)

TILE_TOKENS = 2 * PAGE_TOKENS
_DOCUMENT_TOKENS = (2 * TILE_TOKENS, 4 * TILE_TOKENS)
_PAGES = 6
"""Of a document, on average."""
_NUM_PREFILL_NODES = 2
_DOCUMENTS_EACH = 4
"""That each node's cache has room for."""
NUM_HELD = (1 + _NUM_PREFILL_NODES) * _DOCUMENTS_EACH
NUM_DOCUMENTS = 4 * NUM_HELD
_ENDS = ((5,), (20, 9, 41), (7, 7, 7, 300, 11))

Answered = tuple[list[int], common_pb2.Usage | None]
"""An answer's tokens, and its end; None if its asker has left."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked."""

    num_asked: int
    seed: int = 0
    num_workers: int = 6
    """Requests at once."""
    cancel_share: float = 0.15
    """Of the requests, those whose asker leaves after a few events."""


@dataclass(frozen=True)
class Ask:
    """A request; `leaves_after` so many events, if at all."""

    number: int
    options: dict[str, Any]
    leaves_after: int | None


def asks(plan: Plan) -> list[Ask]:
    """The same for the same plan."""
    draw = random.Random(plan.seed)
    documents = [draw.choices(range(3, 320), k=draw.randint(*_DOCUMENT_TOKENS)) for _ in range(NUM_DOCUMENTS)]
    weights = [1 / rank for rank in range(1, NUM_DOCUMENTS + 1)]
    sampled = SamplingParams(temperature=0.8, top_k=50, seed=11, ignore_eos=True)
    return [
        Ask(
            number,
            {
                "token_ids": (*draw.choices(documents, weights)[0], *draw.choice(_ENDS)),
                "num_chains": draw.randint(1, 3),
                "max_new_tokens": draw.choice([2, 5, 9]),
                "sampling": draw.choice([SamplingParams(ignore_eos=True), sampled]),
                "max_draft_tokens": draw.choice([0, 3]),
            },
            draw.randint(0, 3) if draw.random() < plan.cancel_share else None,
        )
        for number in range(plan.num_asked)
    ]


class Guard:
    """Looks, at each event, whether what must hold at any time does."""

    def __init__(self, node: DecodeNode, prefill_nodes: Sequence[PrefillNode], budget_bytes: int) -> None:
        self.problems: list[str] = []
        self.num_looks = 0
        self.most_bytes = Counter[str]()
        """That each cache has held."""
        self._node, self._prefill_nodes, self._budget_bytes = node, prefill_nodes, budget_bytes
        self._read: dict[str, str] = {}
        """Of each answer, what its prompt's pages hold."""

    def look(self) -> None:
        """Note what does not hold."""
        self.num_looks += 1
        node, cache = self._node, self._node.page_line.cache
        cache.check_integrity()
        held = {"decode": cache.pool.num_idle * node.owner._store.layout.page_bytes}
        for number, each in enumerate(self._prefill_nodes):
            assert each.service._loop is not None
            held[f"prefill {number}"] = each.service._loop.prefixes.held_bytes
        self.most_bytes |= Counter(held)
        self.problems += [
            f"{name} keeps {size} bytes of {self._budget_bytes}"
            for name, size in held.items()
            if size > self._budget_bytes
        ]
        for name, request in node.owner._requests.items():
            if request.stage is Stage.DECODING and request.pages is not None:
                num_whole = (len(request.job.token_ids) - 1) // PAGE_TOKENS
                digest = self._digest(request.pages, num_whole)
                if self._read.setdefault(name, digest) != digest:
                    self.problems.append(f"pages that answer {name} reads have changed")

    def _digest(self, pages: Any, num_whole: int) -> str:
        store = self._node.owner._store
        table = store.page_table(pages)[:num_whole]
        digest = xxhash.xxh3_64()
        for of_pages in (store.k_pages_LBPKD, store.v_pages_LBPKD):
            digest.update(of_pages[:, table].numpy().tobytes())
        return digest.hexdigest()


async def _answer(channel: grpc.aio.Channel, ask: Ask, guard: Guard | None) -> Answered:
    token_ids: list[int] = []
    requests = decode_requests(request_id=str(ask.number), **ask.options)
    call = DecodeServiceStub(channel).Decode(iter(requests), timeout=LIMIT_S)
    num_events = 0
    with Outcome(call).statuses():
        async for response in call:
            if guard is not None:
                guard.look()
                if num_events == ask.leaves_after:
                    call.cancel()
                    return token_ids, None
            num_events += 1
            match response.WhichOneof("event"):
                case "token":
                    token_ids.append(response.token.token_id)
                case "finished":
                    return token_ids, response.finished.usage
    raise AssertionError("an answer without an end")


@asynccontextmanager
async def _nodes(checkpoint: Checkpoint, *, keeps: bool) -> AsyncIterator[tuple[DecodeNode, list[PrefillNode], int]]:
    """A decode node of few pages, its prefill nodes, and the budget of each one's cache in bytes."""
    path, config = str(checkpoint.path), checkpoint.config
    budget_bytes = pages_bytes(config, _DOCUMENTS_EACH * _PAGES) if keeps else 0
    async with AsyncExitStack() as stack:
        prefill_nodes = [
            await stack.enter_async_context(
                prefill_node(path, tile_tokens=TILE_TOKENS, prefix_cache_bytes=budget_bytes)
            )
            for _ in range(_NUM_PREFILL_NODES)
        ]
        node = await stack.enter_async_context(
            decode_node(
                path,
                [each.address for each in prefill_nodes],
                prefill_tile_tokens=TILE_TOKENS,
                prefix_cache_bytes=budget_bytes,
                kv_cache_bytes=pages_bytes(config, 2 * _DOCUMENTS_EACH * _PAGES),
            )
        )
        yield node, prefill_nodes, budget_bytes


async def _all(node: DecodeNode, plan: Plan, guard: Guard | None) -> list[Answered]:
    turns = asyncio.Semaphore(plan.num_workers)
    async with open_channel(node.address, Security()) as channel:

        async def one(ask: Ask) -> Answered:
            async with turns:
                return await _answer(channel, ask, guard)

        return await asyncio.gather(*map(one, asks(plan)))


async def soak(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Ask nodes that keep nothing, then others that do; what came of it.

    Returns:
        The record; `problems` has what must not have been.
    """
    async with _nodes(checkpoint, keeps=False) as (node, _, _):
        expected = await _all(node, plan, None)
    async with _nodes(checkpoint, keeps=True) as (node, prefill_nodes, budget_bytes):
        guard = Guard(node, prefill_nodes, budget_bytes)
        answers = await _all(node, plan, guard)
        await until_idle(node)
        kept = []
        for each in prefill_nodes:
            await until_prefill_idle(each)
            assert each.service._loop is not None
            each.service._loop.prefixes.check_integrity([])
            kept.append(each.service._loop.prefixes.counts)
        guard.look()
        layout: KvLayout = node.owner._store.layout
        found, num_evicted_pages = node.owner.prefix, node.page_line.cache.num_evicted_pages
    problems = guard.problems
    for ask, (got, usage), (right, _) in zip(asks(plan), answers, expected, strict=True):
        if got != (right if usage is not None else right[: len(got)]):
            problems.append(f"answer {ask.number}: {got}, not {right}")
    usages = [usage for _, usage in answers if usage is not None]
    num_prompt_tokens = sum(usage.num_prompt_tokens for usage in usages)
    return {
        "bench": "soak of documents",
        "seed": plan.seed,
        "workers": plan.num_workers,
        "num_documents": NUM_DOCUMENTS,
        "num_documents_held": NUM_HELD,
        "num_requests": plan.num_asked,
        "num_cancelled": plan.num_asked - len(usages),
        "prompt_tokens": num_prompt_tokens,
        "found_on_decode_node_share": found.num_hit_tokens / max(1, found.num_query_tokens),
        "found_on_prefill_nodes_share": sum(each.num_hit_tokens for each in kept)
        / max(1, sum(each.num_queried_tokens for each in kept)),
        "cached_share": sum(usage.num_cached_tokens + usage.num_prefill_cached_tokens for usage in usages)
        / max(1, num_prompt_tokens),
        "evicted_pages": num_evicted_pages,
        "evicted_tiles": sum(each.num_evicted_tiles for each in kept),
        "page_bytes": layout.page_bytes,
        "budget_bytes": budget_bytes,
        "most_bytes": dict(guard.most_bytes),
        "num_looks": guard.num_looks,
        "problems": problems,
    }
