"""Short prompts on an idle cluster, and beside a document: one after the other, or as they come."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bench.harness.contest import Case, Contest
from bench.harness.percentile import percentile
from bench.head_of_line.clusters import running
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.defaults import TILE_TOKENS
from colm.events import Finished, ProvisionalToken, Token
from colm.model.config import ChainConfig

_T = TypeVar("_T")

SHORT_BAR_X, DOCUMENT_BAR_X = 3.0, 1.1
"""What is wanted: short prompts take at most 3 times their time alone and a tile of the document, 95 in 100 of them;
the document at most 1.1 times its time alone and the work of the others."""
_LEAD_S = 1.0
"""From the document's start to the first short prompt."""
_NUM_ALONE = 3
"""Times that each length is measured alone in a round; the median counts."""


@dataclass(frozen=True, slots=True)
class First:
    """A prompt's first token."""

    num_tokens: int
    began_s: float
    """When the client called."""
    time_s: float
    """From then to the first token, as the client saw it."""
    prefill_s: float
    """Of the prefill node, as the decode node saw it."""
    decode_node_s: float
    """From the request's arrival at the decode node to the first token there."""
    provisional_s: float = math.inf
    """From the call to the provisional token; infinite where none came."""


@dataclass(slots=True)
class Alone:
    """What prompts took on the idle cluster in this round; by length."""

    time_s: dict[int, float]
    prefill_s: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class HeadOfLineCase(Case):
    """One document and several short prompts."""

    model: Path
    state_dir: Path | None
    document_tokens: int
    lengths: Sequence[int]
    num_shorts: int
    load: float
    """Of the engine, by the short prompts that come as they like."""

    @property
    def name(self) -> str:
        """The document's length."""
        return f"head_of_line_{self.document_tokens}"

    @property
    def shape(self) -> dict[str, Any]:
        """Without the places of files."""
        lengths = ",".join(map(str, self.lengths))
        return {
            "model": self.model.name, "document_tokens": self.document_tokens, "lengths": lengths,
            "num_shorts": self.num_shorts, "load": self.load,
        }  # fmt: skip

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Alone, then beside the document in a closed and in an open loop."""
        config = Checkpoint.open(self.model).config
        rng = np.random.default_rng(seed)
        with running(self.model, self.state_dir) as state:
            measured = _Measured(self, config, state, rng)
            yield Contest(
                check=measured.check,
                contenders={
                    "alone": measured.alone,
                    "closed_loop": partial(measured.beside_document, measured.one_by_one),
                    "open_loop": partial(measured.beside_document, measured.as_they_come),
                },
            )


Pattern = Callable[[AsyncClient, Sequence[NDArray[np.int64]]], AsyncIterator[First]]
"""Sends prompts, and yields each one's first token."""


class _Measured:
    """The turns on one cluster; those beside the document are compared with the round's own time alone."""

    def __init__(
        self, case: HeadOfLineCase, config: ChainConfig, state: ClusterState, rng: np.random.Generator
    ) -> None:
        self._case = case
        self._config = config
        self._state = state
        self._rng = rng
        self._alone = Alone({}, {})

    def check(self) -> None:
        """Check that the cluster reads all of each prompt, and serves the model.

        Raises:
            AssertionError: it does not.
        """
        first = asyncio.run(self._run(lambda client: first_token(client, self._prompt(max(self._case.lengths)))))
        assert first.num_tokens == max(self._case.lengths)

    def alone(self) -> Mapping[str, float]:
        """Each length, and the document, with nothing else on the cluster."""

        async def ask(client: AsyncClient) -> Mapping[str, float]:
            seen = {}
            for length in (*self._case.lengths, self._case.document_tokens):
                num_times = 1 if length == self._case.document_tokens else _NUM_ALONE
                firsts = [await first_token(client, self._prompt(length)) for _ in range(num_times)]
                self._alone.time_s[length] = median(first.time_s for first in firsts)
                self._alone.prefill_s[length] = median(first.prefill_s for first in firsts)
                name = "document" if length == self._case.document_tokens else f"tokens{length}"
                seen[f"{name}_s"] = self._alone.time_s[length]
            return seen

        return asyncio.run(self._run(ask))

    def beside_document(self, pattern: Pattern) -> Mapping[str, float]:
        """Short prompts beside the document; 'of bar' is up to 1 where the bar is met."""

        async def ask(client: AsyncClient) -> tuple[First, list[First]]:
            document = asyncio.create_task(first_token(client, self._prompt(self._case.document_tokens)))
            await asyncio.sleep(_LEAD_S)
            shorts = [first async for first in pattern(client, self._shorts())]
            return await document, shorts

        document, shorts = asyncio.run(self._run(ask))
        alone_s, length, end_s = self._alone.time_s, document.num_tokens, document.began_s + document.time_s
        others_s = sum(alone_s[first.num_tokens] for first in shorts if first.began_s + first.time_s <= end_s)
        shorts = [first for first in shorts if first.began_s < end_s]
        assert shorts, "the document was over before the first short prompt; make it longer"
        num_tiles = self._config.num_layers * -(-length // TILE_TOKENS)
        tile_s = self._alone.prefill_s[length] / num_tiles
        ratios = [first.time_s / alone_s[first.num_tokens] for first in shorts]
        of_bar = [first.time_s / (SHORT_BAR_X * alone_s[first.num_tokens] + tile_s) for first in shorts]
        document_x = document.time_s / (alone_s[length] + others_s)
        times_s = {each: [first.time_s for first in shorts if first.num_tokens == each] for each in self._case.lengths}
        return {f"tokens{each}_s": median(of_length) for each, of_length in times_s.items() if of_length} | {
            "document_s": document.time_s,
            "p50_x": median(ratios),
            "p95_x": percentile(ratios, 95),
            "document_x": document_x,
            "p95_of_bar_fraction": percentile(of_bar, 95),
            "document_of_bar_fraction": document_x / DOCUMENT_BAR_X,
        }

    async def one_by_one(self, client: AsyncClient, prompts: Sequence[NDArray[np.int64]]) -> AsyncIterator[First]:
        """The next one comes when the one before has its first token."""
        for prompt in prompts:
            yield await first_token(client, prompt)

    async def as_they_come(self, client: AsyncClient, prompts: Sequence[NDArray[np.int64]]) -> AsyncIterator[First]:
        """They come at random times, independent of each other, and keep the engine busy for `load` of its time."""
        gap_s = mean(self._alone.prefill_s[len(prompt)] for prompt in prompts) / self._case.load
        asked = []
        for prompt, wait_s in zip(prompts, self._rng.exponential(gap_s, len(prompts)), strict=True):
            asked.append(asyncio.create_task(first_token(client, prompt)))
            await asyncio.sleep(wait_s)
        for task in asked:
            yield await task

    def _shorts(self) -> list[NDArray[np.int64]]:
        lengths = [self._case.lengths[number % len(self._case.lengths)] for number in range(self._case.num_shorts)]
        return [self._prompt(length) for length in self._rng.permutation(lengths)]

    def _prompt(self, num_tokens: int) -> NDArray[np.int64]:
        return self._rng.integers(0, self._config.vocab_size, num_tokens)

    async def _run(self, ask: Callable[[AsyncClient], Awaitable[_T]]) -> _T:
        async with AsyncClient(self._state.gateway_address, self._state.security) as client:
            return await ask(client)


async def first_token(client: AsyncClient, token_ids: NDArray[np.int64], *, asks_provisional: bool = False) -> First:
    """Ask for one token of a prompt's answer, and for a provisional one before it if that is wanted."""
    began_s, time_s, provisional_s = perf_counter(), math.inf, math.inf
    asked = client.generate(token_ids=token_ids, max_new_tokens=1, provisional_first_token=asks_provisional)
    async with aclosing(asked) as events:
        async for event in events:
            if isinstance(event, ProvisionalToken):
                provisional_s = perf_counter() - began_s
            if isinstance(event, Token | Finished):  # an answer may end at once
                time_s = min(time_s, perf_counter() - began_s)
            if isinstance(event, Finished):
                timings = event.timings
                num_tokens = event.usage.num_prompt_tokens
                return First(num_tokens, began_s, time_s, timings.prefill_s, timings.first_token_s, provisional_s)
    raise AssertionError("a stream of events ends with Finished or raises")
