"""What a document's next question costs at a prefill node that has forgotten it: `python -m bench.uplink DIR --json`.

A decode node in this process holds the document's keys and values. Each round starts prefill nodes anew, which have
nothing of it, and asks the same question of each:

    computed    the node takes nothing from the decode node, and computes the document again
    moved       the document's keys and values come up on the stream (docs/adr/0061)
    kept        another question at the node of before, which has them by now

Nodes show each other certificates, as in a cluster, since nothing comes up otherwise. Times are from the call to the
first token; the nodes' start is not in them. The answers of the first two must be the same.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ByteSize

from bench.harness.contest import Case, Contest
from bench.harness.suite import Options, arguments, positive, run
from cluster.decode_calls import GrpcDecodeCalls
from cluster.front_door.placement import DecodeJob, DecodeLease
from colm.checkpoint import Checkpoint
from colm.clock import Deadline, MonotonicClock, utc_now
from colm.defaults import TILE_TOKENS
from colm.events import Finished, Token
from colm.line import Beat
from colm.placement import Placement
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from colm.wire.authority import Authority
from colm.wire.members import Member
from colm.wire.security import Security, new_tls, new_token
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import PrefillLease, StaticPrefillPool
from decode_node.settings import DecodeSettings
from prefill_node.node import PrefillNode, PrefillOptions
from prefill_node.settings import PrefillSettings

_KV_CACHE_BYTES = 1 << 30
_NOBODY = "127.0.0.1:9"
"""The discard port, until a prefill node is up."""
_QUESTION_TOKENS = 40
_TIMEOUT_S = 600.0
_ANSWER_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class UplinkCase(Case):
    """A document of one length."""

    model: Path
    document_tokens: int
    tile_tokens: int

    @property
    def name(self) -> str:
        """By the length."""
        return f"uplink_{self.document_tokens}_tokens"

    @property
    def shape(self) -> dict[str, Any]:
        """Without the places of files."""
        return {
            "model": self.model.name,
            "document_tokens": self.document_tokens,
            "question_tokens": _QUESTION_TOKENS,
            "tile_tokens": self.tile_tokens,
        }

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """The three ways to the same document's keys and values."""
        with asyncio.Runner() as runner:
            asked = _Asked(self, seed)
            runner.run(asked.start())
            try:
                yield Contest(
                    check=lambda: runner.run(asked.learn()),
                    contenders={
                        "computed": lambda: runner.run(asked.at_a_new_node(is_moved=False)),
                        "moved": lambda: runner.run(asked.at_a_new_node(is_moved=True)),
                        "kept": lambda: runner.run(asked.once_more()),
                    },
                    ours="moved",
                    against=("computed",),
                )
            finally:
                runner.run(asked.stop())


class _NewestNode:
    """A pool of the one prefill node that is up."""

    def __init__(self) -> None:
        self.pool = StaticPrefillPool([_NOBODY], MonotonicClock())

    def loads(self) -> Mapping[str, int]:
        return self.pool.loads()

    def lease(
        self, *, num_tokens: int, beat: Beat, preferred: str | None, refused_by: Collection[str]
    ) -> AbstractAsyncContextManager[PrefillLease]:
        return self.pool.lease(num_tokens=num_tokens, beat=beat, preferred=preferred, refused_by=refused_by)


class _Asked:
    """The nodes, and who asks them."""

    def __init__(self, case: UplinkCase, seed: int) -> None:
        self._case = case
        self._rng = np.random.default_rng(seed)
        self._config = Checkpoint.open(case.model).config
        self._document = self._ids(case.document_tokens)
        authority, token = Authority.new(utc_now()), new_token()
        self._security = {member: Security(token=token, tls=new_tls(member, authority)) for member in Member}
        self._placement = Placement.of("cpu", "auto", torch.get_num_threads())
        self._request_ids = itertools.count()
        self._newest = _NewestNode()
        self._question = self._ids(_QUESTION_TOKENS)
        self._computed_answer: list[int] | None = None
        self._kept_node: PrefillNode | None = None
        self._node: DecodeNode
        self._calls: GrpcDecodeCalls

    async def start(self) -> None:
        """Bring the decode node up."""
        settings = DecodeSettings(kv_cache_bytes=ByteSize(_KV_CACHE_BYTES), orphan_s=0)
        options = DecodeOptions(
            model_path=str(self._case.model),
            placement=self._placement,
            settings=settings,
            prefill_tile_tokens=self._case.tile_tokens,
        )
        self._node = DecodeNode(options, self._security[Member.DECODE], self._newest)
        await self._node.start()
        self._calls = GrpcDecodeCalls(self._security[Member.GATEWAY])

    async def stop(self) -> None:
        """Take everything down."""
        await self._calls.close()
        await self._node.stop()
        if self._kept_node is not None:
            await self._kept_node.stop()

    async def learn(self) -> None:
        """Let the decode node have the document, once for each contender's salt.

        Raises:
            AssertionError: it does not keep it.
        """
        async with self._a_prefill_node(is_moved=False):
            for salt in (b"computed", b"moved"):
                await self._answer(self._ids(1), salt)
                seen = await self._answer(self._ids(2), salt)
                assert seen.num_found, "the decode node has kept nothing of the document"

    async def at_a_new_node(self, *, is_moved: bool) -> Mapping[str, float]:
        """The question at a prefill node that has nothing of the document."""
        if not is_moved:
            self._question = self._ids(_QUESTION_TOKENS)
        async with self._a_prefill_node(is_moved=is_moved, keeps=is_moved) as prefill:
            seen = await self._answer(self._question, b"moved" if is_moved else b"computed")
            if is_moved:
                assert seen.token_ids == self._computed_answer, "an answer over keys and values that came up is another"
            self._computed_answer = seen.token_ids
            samples = {s.name: s.value for metric in prefill.metrics.collect() for s in metric.samples}
        num_prompt_tokens = self._case.document_tokens + _QUESTION_TOKENS - 1
        num_new_tokens = num_prompt_tokens - seen.num_found if is_moved else num_prompt_tokens
        assert samples["colm_prefill_tokens_total"] == num_new_tokens, "it has computed more, or less"
        return {"s": seen.first_token_s, "up_bytes": samples["colm_prefix_uplink_bytes_total"]}

    async def once_more(self) -> Mapping[str, float]:
        """Another question at the node of the last turn."""
        return {"s": (await self._answer(self._ids(_QUESTION_TOKENS), b"moved")).first_token_s}

    @asynccontextmanager
    async def _a_prefill_node(self, *, is_moved: bool, keeps: bool = False) -> AsyncIterator[PrefillNode]:
        """The only one that is up; after the block too, if it is the one that keeps."""
        if self._kept_node is not None:
            await self._kept_node.stop()
            self._kept_node = None
        options = PrefillOptions(
            model_path=str(self._case.model),
            placement=self._placement,
            settings=PrefillSettings(tile_tokens=self._case.tile_tokens),
        )
        node = PrefillNode(options, self._security[Member.PREFILL])
        await node.start()
        node.service.takes_prefixes = is_moved
        self._newest.pool = StaticPrefillPool([node.address], MonotonicClock())
        try:
            yield node
        finally:
            if keeps:
                self._kept_node = node
            else:
                await node.stop()

    async def _answer(self, question: NDArray[np.int64], salt: bytes) -> "_Seen":
        job = DecodeJob(
            request_id=str(next(self._request_ids)),
            token_ids=np.concatenate([self._document, question]),
            scale=Changing(Scale(num_chains=self._config.num_chains, min_chains=self._config.num_chains)),
            max_new_tokens=_ANSWER_TOKENS,
            sampling=SamplingParams(ignore_eos=True),
            attention="dense",
            kv_codec="raw",
            max_draft_tokens=0,
            cache_salt=salt,
        )
        lease = DecodeLease(address=self._node.address, lease_id="")
        deadline = Deadline.after(MonotonicClock(), _TIMEOUT_S)
        began_s, first_token_s, token_ids, num_found = perf_counter(), 0.0, list[int](), 0
        async with aclosing(self._calls.decode(lease, job, only_if_room=False, deadline=deadline)) as events:
            async for event in events:
                if isinstance(event, Token):
                    first_token_s = first_token_s or perf_counter() - began_s
                    token_ids.append(event.token_id)
                elif isinstance(event, Finished):
                    num_found = event.usage.num_cached_tokens
        return _Seen(first_token_s, token_ids, num_found)

    def _ids(self, num_tokens: int) -> NDArray[np.int64]:
        return self._rng.integers(0, self._config.vocab_size, num_tokens)


@dataclass(frozen=True, slots=True)
class _Seen:
    first_token_s: float
    token_ids: list[int]
    num_found: int
    """Prompt tokens that the decode node had."""


class UplinkOptions(Options):
    """Of this benchmark."""

    model: Path
    tokens: list[int]
    tile_tokens: int


def main() -> None:
    """Ask again about a document."""
    parser = arguments("bench.uplink", __doc__, rounds=5)
    parser.add_argument("model", type=Path, metavar="DIR", help="checkpoint")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[6400], metavar="N", help="of documents; 6400")
    parser.add_argument(
        "--tile-tokens", type=positive, default=TILE_TOKENS, metavar="N", help=f"of the prefill node; {TILE_TOKENS}"
    )
    options = parser.parse_args(namespace=UplinkOptions())
    run(
        [
            UplinkCase(model=options.model, document_tokens=num_tokens, tile_tokens=options.tile_tokens)
            for num_tokens in options.tokens
        ],
        options,
    )


if __name__ == "__main__":
    main()
