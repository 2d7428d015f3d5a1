"""What automatic scale gains under load: `python -m bench.auto_scale models/SmolLM2-135M-Instruct-9-3 --json`.

One decode node in this process, asked over gRPC by clients of which each asks again as soon as it has its answer:

    auto    answers leave their scale to the node: all chains while it has little to do, fewer under load
    full    answers at all chains, whatever the load

The two take turns, at each number of clients. A turn begins on an idle node, so what the policy takes to give way is in
it, and ends after `--seconds`, whatever is unfinished. Prompts are short: the node reads them itself. A client that is
refused asks again after 0.25 s. Clients and node share the processor, as on one machine.

Times between tokens are those of one answer, from the second token on. Shares of tokens are by their scale; refused and
expired requests are shares of those that were asked. First, answers beside others must be those that come alone.

The defaults take two and a half minutes.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ByteSize

from bench.harness.contest import Case, Contest
from bench.harness.percentile import percentile
from bench.harness.suite import Options, arguments, positive, run
from cluster.decode_calls import GrpcDecodeCalls
from cluster.front_door.placement import DecodeJob, DecodeLease
from colm.checkpoint import Checkpoint
from colm.clock import Deadline, MonotonicClock
from colm.errors import CapacityExceeded, ColmError, DeadlineExceeded
from colm.events import Token
from colm.placement import Placement
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from colm.wire.security import Security
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import StaticPrefillPool
from decode_node.settings import DecodeSettings

REFUSED_PAUSE_S = 0.25
_MOST_SPANS = 100
"""Of a turn's seconds, before it is given up."""
_KV_CACHE_BYTES = 1 << 28
_NOBODY = "127.0.0.1:9"
"""The discard port: prompts are short, so no prefill node is asked."""


@dataclass(frozen=True, kw_only=True)
class AutoScaleCase(Case):
    """One number of clients."""

    model: Path
    num_clients: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    timeout_s: float
    max_requests: int
    max_draft_tokens: int

    @property
    def name(self) -> str:
        """The clients."""
        return f"auto_scale_{self.num_clients}_clients"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, and the load."""
        config = Checkpoint.open(self.model).config
        return config.to_dict() | {
            "model": self.model.name,
            "num_clients": self.num_clients,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "turn_s": self.seconds,
            "timeout_s": self.timeout_s,
            "max_requests": self.max_requests,
            "max_draft_tokens": self.max_draft_tokens,
        }

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Answers whose scale the node chooses, and those of all chains."""
        with asyncio.Runner() as runner:
            served = _Served(self, seed)
            runner.run(served.start())
            all_chains = Checkpoint.open(self.model).config.num_chains

            def turn(min_chains: int) -> Mapping[str, float]:
                return runner.run(served.turn(Scale(num_chains=all_chains, min_chains=min_chains)))

            try:
                yield Contest(
                    check=lambda: runner.run(served.check(Scale(num_chains=all_chains, min_chains=all_chains))),
                    contenders={"auto": partial(turn, 1), "full": partial(turn, all_chains)},
                    ours="auto",
                    against=("full",),
                    compared_by="tokens_per_s",
                )
            finally:
                runner.run(served.stop())


@dataclass(slots=True)
class _Seen:
    """What the clients of a turn saw."""

    num_asked: int = 0
    num_refused: int = 0
    num_expired: int = 0
    num_tokens: Counter[int] = field(default_factory=Counter)
    """By scale."""
    first_token_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    def metrics(self, seconds: float, all_chains: int) -> Mapping[str, float]:
        """Of a turn of so many seconds."""
        total = self.num_tokens.total()
        return {
            "tokens_per_s": total / seconds,
            "token_p50_s": percentile(self.gaps_s, 50),
            "token_p95_s": percentile(self.gaps_s, 95),
            "first_token_p50_s": percentile(self.first_token_s, 50),
            **{f"chains{scale}_fraction": self.num_tokens[scale] / total for scale in range(1, all_chains + 1)},
            "refused_fraction": self.num_refused / self.num_asked,
            "expired_fraction": self.num_expired / self.num_asked,
        }


class _Served:
    """A decode node and its clients, on one event loop."""

    def __init__(self, case: AutoScaleCase, seed: int) -> None:
        self._case = case
        self._rng = np.random.default_rng(seed)
        config = Checkpoint.open(case.model).config
        self._vocab_size, self._all_chains = config.vocab_size, config.num_chains
        self._ids = itertools.count()
        self._node: DecodeNode
        self._calls: GrpcDecodeCalls

    async def start(self) -> None:
        case = self._case
        settings = DecodeSettings(
            kv_cache_bytes=ByteSize(_KV_CACHE_BYTES),
            max_local_prefill_tokens=case.prompt_tokens,
            max_requests=case.max_requests,
            max_draft_tokens=case.max_draft_tokens,
            orphan_s=0,
        )
        placement = Placement.of("cpu", "auto", torch.get_num_threads())
        options = DecodeOptions(model_path=str(case.model), placement=placement, settings=settings)
        self._node = DecodeNode(options, Security(), StaticPrefillPool([_NOBODY], MonotonicClock()))
        await self._node.start()
        self._calls = GrpcDecodeCalls(Security())

    async def stop(self) -> None:
        await self._calls.close()
        await self._node.stop()

    async def check(self, full: Scale) -> None:
        """Check that answers do not depend on their company.

        Raises:
            AssertionError: one does.
        """
        prompts = [self._prompt() for _ in range(3)]
        alone = [await self._answer(prompt, full, _Seen()) for prompt in prompts]
        together = await asyncio.gather(*(self._answer(prompt, full, _Seen()) for prompt in prompts))
        assert alone == together, "an answer beside others is another than alone"

    async def turn(self, scale: Scale) -> Mapping[str, float]:
        """Ask for some seconds, for as many again while nothing was seen, and leave nothing behind.

        Raises:
            ColmError: nothing was seen.
        """
        seen, case = _Seen(), self._case
        clients = [asyncio.create_task(self._ask_on(scale, seen)) for _ in range(case.num_clients)]
        began_s = perf_counter()
        for _ in range(_MOST_SPANS):
            for client in (await asyncio.wait(clients, timeout=case.seconds))[0]:
                client.result()  # they end by errors alone
            if seen.gaps_s:
                break
        else:
            raise ColmError(f"seconds={case.seconds:g}: no answer came to its second token in {_MOST_SPANS} times that")
        seen_s = perf_counter() - began_s
        metrics = seen.metrics(seen_s, self._all_chains)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        while self._node.owner.stages().total():
            await asyncio.sleep(0.01)
        return metrics

    async def _ask_on(self, scale: Scale, seen: _Seen) -> None:
        while True:
            seen.num_asked += 1
            try:
                await self._answer(self._prompt(), scale, seen)
            except CapacityExceeded:
                seen.num_refused += 1
                await asyncio.sleep(REFUSED_PAUSE_S)
            except DeadlineExceeded:
                seen.num_expired += 1

    async def _answer(self, prompt: NDArray[np.int64], scale: Scale, seen: _Seen) -> list[int]:
        case, token_ids = self._case, list[int]()
        job = DecodeJob(
            request_id=str(next(self._ids)),
            token_ids=prompt,
            scale=Changing(scale),
            max_new_tokens=case.new_tokens,
            sampling=SamplingParams(ignore_eos=True),
            attention="dense",
            kv_codec="raw",
            max_draft_tokens=None,
        )
        deadline = Deadline.after(MonotonicClock(), case.timeout_s)
        lease = DecodeLease(address=self._node.address, lease_id="")
        last_s = perf_counter()
        async with aclosing(self._calls.decode(lease, job, only_if_room=False, deadline=deadline)) as events:
            async for event in events:
                if isinstance(event, Token):
                    now_s = perf_counter()
                    (seen.gaps_s if token_ids else seen.first_token_s).append(now_s - last_s)
                    token_ids.append(event.token_id)
                    seen.num_tokens[event.num_chains] += 1
                    last_s = now_s
        return token_ids

    def _prompt(self) -> NDArray[np.int64]:
        return self._rng.integers(0, self._vocab_size, self._case.prompt_tokens)


class AutoScaleOptions(Options):
    """Of this benchmark."""

    model: Path
    clients: list[int]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    timeout: float
    max_requests: int
    max_draft_tokens: int


def main() -> None:
    """Put a decode node under load."""
    settings = DecodeSettings()
    parser = arguments("bench.auto_scale", __doc__, rounds=2)
    parser.add_argument("model", type=Path, metavar="DIR", help="checkpoint of several chains")
    parser.add_argument(
        "--clients", type=positive, nargs="+", default=[1, 8, 32, 80], metavar="N", help="at once; 1 8 32 80"
    )
    parser.add_argument("--prompt-tokens", type=positive, default=24, metavar="N", help="of each request; 24")
    parser.add_argument("--new-tokens", type=positive, default=48, metavar="N", help="of each answer; 48")
    parser.add_argument("--seconds", type=float, default=6.0, metavar="S", help="of a turn; 6")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="of a request; 10")
    parser.add_argument(
        "--max-requests", type=positive, default=settings.max_requests, metavar="N", help=f"{settings.max_requests}"
    )
    parser.add_argument("--max-draft-tokens", type=int, default=0, metavar="N", help="of a round; 0")
    options = parser.parse_args(namespace=AutoScaleOptions())
    cases = [
        AutoScaleCase(
            model=options.model,
            num_clients=num_clients,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            seconds=options.seconds,
            timeout_s=options.timeout,
            max_requests=options.max_requests,
            max_draft_tokens=options.max_draft_tokens,
        )
        for num_clients in options.clients
    ]
    run(cases, options)


if __name__ == "__main__":
    main()
