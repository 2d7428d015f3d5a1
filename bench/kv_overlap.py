"""What the KV stream adds to a prompt's computation: `python -m bench.kv_overlap --json`.

A process of its own holds the prefill engine. In each round a prompt goes through it three times: without a stream, and
through the prefill node's service to this process, which receives, verifies and stores it as a decode node does, once
all over TLS (`stream`) and once with payloads in shared memory. The decode node's own first step is not in it.

`over_engine_x` is the time over the engine's; `stream_cpu_s` is the processor time of both processes beside the
computation's. They share this machine, so the stream's work takes time from the engine: `own_core_x` is what would be
left if that work had been done by a core that the engine does not use.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter, process_time
from typing import Any, Literal

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from bench.harness.contest import Case, Contest
from bench.harness.suite import Options, arguments, num_tokens, run
from bench.kernels.common import short
from bench.prefill.case import CHECKED_TILE_TOKENS, check_engine, engine_of_random, prompt
from colm.allocator import keep_freed_memory
from colm.clock import MonotonicClock
from colm.defaults import JOB_LEASE_S, PAGE_TOKENS, TILE_TOKENS
from colm.dtypes import fastest_dtype
from colm.kv import KvFormat
from colm.metrics.kv_stream import KvStreamMetrics
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.placement import CPU
from colm.wire.channels import BlockingChannels
from colm.wire.endpoint import bind, create_server, dial_address
from colm.wire.security import Security, new_tls
from colm.wire.shared_memory import host_id
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_layout import KvLayout
from decode_node.kv_receiver import KvReceiver
from decode_node.kv_store import KvStore
from decode_node.prefill_pool import PrefillLease
from decode_node.transfer_ledger import TransferLedger
from prefill_node.cost_model import calibrate
from prefill_node.memory import default_memory_bytes
from prefill_node.prefill_loop import PrefillLoop
from prefill_node.service import PrefillService
from prefill_node.settings import PrefillSettings
from prefill_node.sparse.planner import SparsePlanner

MODEL = "llama-3.2-1b-8-8-8-8-air"
FINGERPRINT = "bench"
BAR_X = 1.03
"""What is wanted of `own_core_x` at 8K tokens and above."""
START_TIMEOUT_S = 120
NUM_CHECKED_TOKENS = 2 * TILE_TOKENS + 1


@dataclass(frozen=True, kw_only=True)
class OverlapCase(Case):
    """Prompts of one length."""

    model: str
    config: ChainConfig
    dtype: torch.dtype
    num_tokens: int

    @property
    def name(self) -> str:
        """The length."""
        return f"kv_overlap_{self.num_tokens}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's name in place of its configuration."""
        return {"model": self.model, "dtype": short(self.dtype), "num_tokens": self.num_tokens}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """The engine alone before the stream, whose ratios rest on it."""
        kv_format = KvFormat.of(self.config, self.dtype)
        with _node(self, seed) as node:
            turns = _Turns(self, seed, node, KvLayout(kv_format, PAGE_TOKENS))
            yield Contest(
                check=turns.check,
                contenders={
                    "engine": turns.engine,
                    "stream": partial(turns.stream, ""),
                    "shared_memory": partial(turns.stream, host_id()),
                },
                facts={"payload_bytes": self.num_tokens * kv_format.token_bytes},
            )


class _Node:
    """The prefill node's process, as this one sees it."""

    def __init__(self, pipe: Connection, security: Security, address: str) -> None:
        self.security = security
        self.address = address
        self._pipe = pipe

    def ask(self, what: Literal["engine", "cpu"]) -> float:
        """Run the prompt without a stream; or nothing. The process's processor time since the last answer, in s."""
        self._pipe.send(what)
        answer: float = self._pipe.recv()
        return answer


@contextmanager
def _node(case: OverlapCase, seed: int) -> Iterator[_Node]:
    spawn, tls = get_context("spawn"), new_tls()
    mine, theirs = spawn.Pipe()
    arguments = case, seed, torch.get_num_threads(), Security(tls=tls), theirs
    process = spawn.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()  # the pipe ends with the process
    try:
        if not mine.poll(START_TIMEOUT_S):
            raise TimeoutError(f"the node was not ready within {START_TIMEOUT_S} s")
        yield _Node(mine, Security(tls=tls.for_clients()), mine.recv())
    finally:
        process.terminate()
        process.join()


def _serve(case: OverlapCase, seed: int, num_threads: int, security: Security, pipe: Connection) -> None:
    """The process: says its address, then does what it is asked."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    asyncio.run(_answer(case, seed, security, pipe))


async def _answer(case: OverlapCase, seed: int, security: Security, pipe: Connection) -> None:
    engine, clock, settings = (
        engine_of_random(case.config, case.dtype, TILE_TOKENS, seed),
        MonotonicClock(),
        PrefillSettings(),
    )
    loop = PrefillLoop(
        engine,
        calibrate(engine, clock),
        clock,
        max_queued=settings.max_queued,
        max_queued_s=settings.max_queued_s,
        memory_bytes=default_memory_bytes(CPU),
        lease_s=JOB_LEASE_S,
        stall_s=settings.stall_s,
    )
    planner = SparsePlanner(case.config, settings.sparse_policy, None)
    server = create_server(security)
    PrefillService(
        engine,
        loop,
        fingerprint=FINGERPRINT,
        planner=planner,
        metrics=KvStreamMetrics(CollectorRegistry()),
        shares_memory=True,
    ).add_to(server)
    port = bind(server, "127.0.0.1", 0, security)
    await server.start()
    pipe.send(dial_address("127.0.0.1", port))
    token_ids, spent_s = prompt(case.config, case.num_tokens, seed), process_time()
    while True:
        try:
            what = await asyncio.to_thread(pipe.recv)
        except EOFError:
            return
        if what == "engine":
            deque(engine.run(token_ids), maxlen=0)
        before_s, spent_s = spent_s, process_time()
        pipe.send(spent_s - before_s)


class _Turns:
    """The contenders."""

    def __init__(self, case: OverlapCase, seed: int, node: _Node, layout: KvLayout) -> None:
        self._case = case
        self._seed = seed
        self._node = node
        self._layout = layout
        self._channels = BlockingChannels(node.security)
        self._names = count()
        self._store = self._store_of(case.num_tokens)
        self._engine_s = self._engine_cpu_s = 0.0

    def check(self) -> None:
        """Hold the engine against the definition, and what is stored behind the stream against the engine's.

        Raises:
            AssertionError: something is wrong.
        """
        case, num_tokens = self._case, min(self._case.num_tokens, NUM_CHECKED_TOKENS)
        check_engine(case.config, case.dtype, CHECKED_TILE_TOKENS, self._seed)
        store = self._store_of(num_tokens)
        self._receive(store, num_tokens, host_id())
        for tile in engine_of_random(case.config, case.dtype, TILE_TOKENS, self._seed).run(self._prompt(num_tokens)):
            rows = slice(tile.first_token, tile.first_token + tile.num_tokens)
            for cache, computed in ((store.k_pages_LBPKD, tile.k_KTD), (store.v_pages_LBPKD, tile.v_KTD)):
                stored = cache[tile.layer].flatten(0, 1)[rows].transpose(0, 1)
                assert torch.equal(stored, computed), f"other bits than the engine's, layer {tile.layer}, {rows}"

    def engine(self) -> Mapping[str, float]:
        """The computation alone."""
        self._node.ask("cpu")
        began_s = perf_counter()
        self._engine_cpu_s = self._node.ask("engine")
        self._engine_s = perf_counter() - began_s
        return {"s": self._engine_s, "cpu_s": self._engine_cpu_s}

    def stream(self, host: str) -> Mapping[str, float]:
        """From the call to the last stored tile.

        Args:
            host: what the node is told; its own name lets payloads go through shared memory.
        """
        self._node.ask("cpu")
        began_s, began_cpu_s = perf_counter(), process_time()
        self._receive(self._store, self._case.num_tokens, host)
        took_s, own_cpu_s = perf_counter() - began_s, process_time() - began_cpu_s
        stream_cpu_s = own_cpu_s + self._node.ask("cpu") - self._engine_cpu_s
        left_s = took_s - stream_cpu_s / torch.get_num_threads()
        own_core_x = left_s / self._engine_s
        return {
            "s": took_s,
            "stream_cpu_s": stream_cpu_s,
            "over_engine_x": took_s / self._engine_s,
            "own_core_x": own_core_x,
            "of_bar_fraction": own_core_x / BAR_X,
        }

    def _receive(self, store: KvStore, num_tokens: int, host: str) -> None:
        ledger = TransferLedger(
            transfer_id=f"bench-{next(self._names)}",
            num_layers=self._case.config.num_layers,
            num_tokens=num_tokens,
        )
        ledger.begin()
        transfer = KvTransfer(
            ledger=ledger,
            fingerprint=FINGERPRINT,
            token_ids=self._prompt(num_tokens),
            table_M=np.arange(store.num_pages, dtype=np.int32),
        )
        lease = PrefillLease(address=self._node.address, lease_id="")
        KvReceiver(transfer, lease, store, self._channels, self._node.security, MonotonicClock(), host).run()

    def _prompt(self, num_tokens: int) -> Any:
        return prompt(self._case.config, num_tokens, self._seed)

    def _store_of(self, num_tokens: int) -> KvStore:
        return KvStore(self._layout, self._layout.pages(num_tokens))


class OverlapOptions(Options):
    """Of this benchmark."""

    preset: str
    lengths: list[int]


def main() -> None:
    """Every length."""
    parser = arguments("bench.kv_overlap", __doc__, rounds=3)
    parser.add_argument("--preset", default=MODEL, help=f"a name of colm.model.presets.PRESETS; {MODEL}")
    parser.add_argument(
        "--lengths", type=num_tokens, nargs="+", default=[8 << 10, 32 << 10], help="of the prompts; 8K 32K"
    )
    options = parser.parse_args(namespace=OverlapOptions())
    keep_freed_memory()
    try:
        config = preset(options.preset)
    except ValueError as err:
        parser.error(f"--preset: {err}")
    dtype = fastest_dtype(CPU)
    run(
        [OverlapCase(model=options.preset, config=config, dtype=dtype, num_tokens=each) for each in options.lengths],
        options,
    )


if __name__ == "__main__":
    main()
