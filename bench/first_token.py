"""Time to the first token on an idle cluster, and what its computation takes: `python -m bench.first_token DIR --json`.

On a cluster of its own, or with `--state-dir` on one that runs. In each round every length is asked of the cluster, run
through a prefill engine in this process, and, where a decode node would compute it by itself, through a decode engine.
The connection is open before, as that of a client that asks again; `connect_s` is what opening it takes, with a call
that asks for the status.

What is wanted of the cluster (`of_bar_fraction` up to 1): 16 tokens or fewer within 25 ms; more within 1.15x of the
plain prefill and 25 ms.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.harness.contest import Case, Contest
from bench.harness.suite import Options, arguments, positive, run
from bench.head_of_line.case import First, first_token
from bench.head_of_line.clusters import running
from cluster.options import load_config
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.defaults import MAX_LOCAL_PREFILL_TOKENS, PAGE_TOKENS, TILE_TOKENS
from colm.dtypes import parse_dtype
from colm.kv import KvFormat
from colm.sampling import SamplingParams
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import StepPlan
from decode_node.running_answer import RunningAnswer
from prefill_node.engine import PrefillEngine

BAR_S, BAR_X, SMALL_TOKENS = 0.025, 1.15, 16
"""What is wanted: prompts of up to so many tokens within the seconds, longer ones within so many times the plain
prefill and the seconds."""


@dataclass(frozen=True, kw_only=True)
class FirstTokenCase(Case):
    """Prompts of several lengths, one after the other."""

    model: Path
    state_dir: Path | None
    lengths: Sequence[int]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """There is one case."""
        return "first_token"

    @property
    def shape(self) -> dict[str, Any]:
        """Without the places of files."""
        return {"model": self.model.name, "lengths": ",".join(map(str, self.lengths))}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Plain runs in this process before the cluster's, whose bar rests on them."""
        plain, rng = _Plain(self), np.random.default_rng(seed)
        with running(self.model, self.state_dir) as state:
            asked = _Asked(self, state, rng, plain)
            yield Contest(
                check=asked.check,
                contenders={"prefill_engine": plain.prefill, "decode_engine": plain.step, "cluster": asked.ask},
            )


class _Plain:
    """Engines without a wire, a loop or a cluster around them."""

    def __init__(self, case: FirstTokenCase) -> None:
        checkpoint = Checkpoint.open(case.model)
        kv_format = KvFormat.of(checkpoint.config, case.dtype)
        layout = KvLayout(kv_format, PAGE_TOKENS)
        self._case = case
        self._config = checkpoint.config
        self._rng = np.random.default_rng(0)
        self._prefill = PrefillEngine(checkpoint, kv_format, tile_tokens=TILE_TOKENS)
        self._store = KvStore(layout, layout.pages(MAX_LOCAL_PREFILL_TOKENS))
        self._decode = DecodeEngine(checkpoint, self._store)
        self.prefill_s: dict[int, float] = {}

    def prefill(self) -> Mapping[str, float]:
        """Chain 1 over all tokens of each length."""
        for length in self._case.lengths:
            self.prefill_s[length] = _seconds(lambda n: deque(self._prefill.run(self._prompt(n)), maxlen=0), length)
        return {f"tokens{length}_s": seconds for length, seconds in self.prefill_s.items()}

    def step(self) -> Mapping[str, float]:
        """A decode node's one step at all chains, of the lengths that it computes by itself."""
        lengths = [length for length in self._case.lengths if length <= MAX_LOCAL_PREFILL_TOKENS]
        return {f"tokens{length}_s": _seconds(self._step, length) for length in lengths}

    def _step(self, num_tokens: int) -> None:
        answer = RunningAnswer(
            unread_token_ids=self._prompt(num_tokens).tolist(),
            position=0,
            num_chains=self._config.num_chains,
            max_new_tokens=1,
            table_M=np.arange(self._store.num_pages, dtype=np.int32),
            sampling=SamplingParams(),
            stop_token_ids=(),
            text_stream=None,
        )
        self._decode.step(StepPlan(tuple(answer.next_rows())))

    def _prompt(self, num_tokens: int) -> NDArray[np.int64]:
        return self._rng.integers(0, self._config.vocab_size, num_tokens)


@dataclass(slots=True)
class _Asked:
    """The cluster's turn."""

    case: FirstTokenCase
    state: ClusterState
    rng: np.random.Generator
    plain: _Plain
    vocab_size: int = field(init=False)
    connect_s: float = field(init=False)
    """Of the last time that each length was asked for."""

    def __post_init__(self) -> None:
        self.vocab_size = Checkpoint.open(self.case.model).config.vocab_size

    def check(self) -> None:
        """Check that the cluster reads all of each prompt, and serves the model.

        Raises:
            AssertionError: it does not.
        """
        self.ask_each()

    def ask(self) -> Mapping[str, float]:
        """Each length's time as the client saw it, and of it the decode node's, from the request to the token.

        Where a provisional token comes when it is asked for, its time too, and that of the token behind it.
        """
        seen: dict[str, float] = {}
        for length, first in self.ask_each(asks_provisional=True).items():
            if first.provisional_s < inf:
                seen[f"tokens{length}_provisional_s"] = first.provisional_s
                seen[f"tokens{length}_behind_provisional_s"] = first.time_s
        seen["connect_s"] = self.connect_s
        for length, first in self.ask_each().items():
            plain_s = self.plain.prefill_s[length]
            bar_s = BAR_S if length <= SMALL_TOKENS else BAR_X * plain_s + BAR_S
            seen |= {
                f"tokens{length}_s": first.time_s,
                f"tokens{length}_decode_node_s": first.decode_node_s,
                f"tokens{length}_of_bar_fraction": first.time_s / bar_s,
            }
        return seen

    def ask_each(self, *, asks_provisional: bool = False) -> dict[int, First]:
        """By length."""

        async def ask() -> dict[int, First]:
            seen = {}
            async with AsyncClient(self.state.gateway_address, self.state.security) as client:
                began_s = perf_counter()
                await client.cluster_status()
                self.connect_s = perf_counter() - began_s
                for length in self.case.lengths:
                    prompt = self.rng.integers(0, self.vocab_size, length)
                    first = await first_token(client, prompt, asks_provisional=asks_provisional)
                    assert first.num_tokens == length, f"the cluster read {first.num_tokens} of {length} tokens"
                    seen[length] = first
            return seen

        return asyncio.run(ask())


def _seconds(work: Callable[[int], object], length: int) -> float:
    began_s = perf_counter()
    work(length)
    return perf_counter() - began_s


class FirstTokenOptions(Options):
    """Of this benchmark."""

    model: Path
    state_dir: Path | None
    tokens: list[int]


def main() -> None:
    """Ask a cluster."""
    parser = arguments("bench.first_token", __doc__, rounds=30)
    parser.add_argument("model", type=Path, metavar="DIR", help="checkpoint that the cluster serves")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="of a cluster that runs; without, one is started")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[16, 512], metavar="N", help="of prompts; 16 512")
    options = parser.parse_args(namespace=FirstTokenOptions())
    dtype = parse_dtype(load_config(None, {"model.path": options.model}).resolved_dtype)
    run(
        [FirstTokenCase(model=options.model, state_dir=options.state_dir, lengths=options.tokens, dtype=dtype)],
        options,
    )


if __name__ == "__main__":
    main()
