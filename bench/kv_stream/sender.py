"""The sending process: a prefill node whose engine computes nothing, raw gRPC, and a bare socket."""

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Thread
from typing import Final

import grpc
import torch
from prometheus_client import CollectorRegistry

from bench.random_weights import RandomWeights
from colm import defaults
from colm.allocator import keep_freed_memory
from colm.clock import MonotonicClock
from colm.kv import KvFormat, KvTile
from colm.metrics.kv_stream import KvStreamMetrics
from colm.model.config import ChainConfig
from colm.wire.endpoint import bind, create_server
from colm.wire.security import Security
from prefill_node.cost_model import CostModel, PrefillShape
from prefill_node.engine import PrefillEngine
from prefill_node.prefill_loop import PrefillLoop
from prefill_node.prefill_run import PrefillRun
from prefill_node.service import PrefillService
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import SparsePolicy

RAW: Final = "/bench.Raw/Pull"
"""Method that answers `BYTES,COUNT` with so many messages of so many bytes."""
FINGERPRINT: Final = "0" * 64
HOST: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 60
_SOCKET_BYTES: Final = 1 << 20
# A small model but for its keys and values, which are those of LLaMA 3.2 1B.
CONFIG: Final = ChainConfig(
    dim=64, hidden_dim=64, num_layers=16, num_heads=8, num_kv_heads=8, chains=(8,), vocab_size=320,
    max_context=1 << 20, explicit_head_dim=64,
)  # fmt: skip
FORMAT: Final = KvFormat.of(CONFIG, torch.bfloat16)


class IdleEngine(PrefillEngine):
    """Hands out slices of the same keys and values, as the engine's are laid out, and computes nothing."""

    def __init__(self, num_tokens: int, seed: int) -> None:
        weights = RandomWeights(config=CONFIG, dtype=FORMAT.dtype, seed=seed)
        super().__init__(weights, FORMAT, tile_tokens=defaults.TILE_TOKENS)
        self.keys_values = random_keys_values(num_tokens, seed)

    def step(self, runs: Sequence[PrefillRun]) -> list[KvTile | None]:
        """The next tile of each."""
        return [self._tile(run) for run in runs]

    def _tile(self, run: PrefillRun) -> KvTile | None:
        with run.own_errors():
            run.cancelled.raise_if_set()
            run.has_begun = True
            k_KTE, v_KTE = (each_KNE[:, run.start : run.stop] for each_KNE in self.keys_values)
            tile = KvTile(run.layer, run.start, k_KTE, v_KTE)
            run.after_keys_values()
            return tile
        return None


def random_keys_values(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(k_KNE, v_KNE) of every layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (FORMAT.num_kv_heads, num_tokens, FORMAT.head_dim)
    k_KNE, v_KNE = (torch.randn(shape, generator=generator).to(FORMAT.dtype) for _ in range(2))
    return k_KNE, v_KNE


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where the sender listens."""

    plain: str
    tls: str
    tcp: tuple[str, int]


@contextmanager
def sending(num_tokens: int, seed: int, security: Security) -> Iterator[Addresses]:
    """Run the process for as long as the context lasts.

    Args:
        num_tokens: of the longest prompt.
        seed: of its keys and values.
        security: of its server with TLS.
    """
    spawn = get_context("spawn")
    mine, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_main, args=(num_tokens, seed, security, theirs), daemon=True)
    process.start()
    theirs.close()  # the pipe ends with the process
    try:
        if not mine.poll(START_TIMEOUT_S):
            raise TimeoutError(f"the sender said no address within {START_TIMEOUT_S} s")
        yield mine.recv()
    finally:
        process.terminate()
        process.join()


def _main(num_tokens: int, seed: int, security: Security, said: Connection) -> None:
    keep_freed_memory()
    asyncio.run(_serve(num_tokens, seed, security, said))


async def _serve(num_tokens: int, seed: int, security: Security, said: Connection) -> None:
    engine, clock = IdleEngine(num_tokens, seed), MonotonicClock()
    shape = PrefillShape.of(CONFIG, engine.tile_tokens)
    loop = PrefillLoop(
        engine,
        CostModel(shape=shape, linear_flop_s=0.0, attention_flop_s=0.0, step_s=1e-3),
        clock,
        max_queued=defaults.MAX_QUEUED,
        max_queued_s=defaults.MAX_QUEUED_S,
        memory_bytes=1 << 40,
        lease_s=defaults.JOB_LEASE_S,
        stall_s=defaults.STALL_S,
    )
    planner = SparsePlanner(CONFIG, SparsePolicy(), None)
    service = PrefillService(
        engine,
        loop,
        fingerprint=FINGERPRINT,
        planner=planner,
        metrics=KvStreamMetrics(CollectorRegistry()),
        shares_memory=True,
    )
    raw = grpc.method_handlers_generic_handler("bench.Raw", {"Pull": grpc.unary_stream_rpc_method_handler(_pull_raw)})
    addresses, servers = [], []  # a server ends with its last reference
    for each in (replace(security, tls=None), security):
        servers.append(server := create_server(each))
        service.add_to(server)
        server.add_generic_rpc_handlers((raw,))
        addresses.append(f"{HOST}:{bind(server, HOST, 0, each)}")
        await server.start()
    listener = socket.create_server((HOST, 0))
    Thread(target=_send_bare, args=(listener,), daemon=True).start()
    plain, tls = addresses
    said.send(Addresses(plain=plain, tls=tls, tcp=listener.getsockname()))
    await asyncio.Event().wait()


async def _pull_raw(request: bytes, context: grpc.aio.ServicerContext) -> None:
    num_bytes, count = map(int, request.split(b","))
    message = bytes(num_bytes)
    for _ in range(count):
        await context.write(message)


def _send_bare(listener: socket.socket) -> None:
    """Answer each connection's 8 bytes, a length, with so many bytes."""
    data = bytes(_SOCKET_BYTES)
    while True:
        connection, _ = listener.accept()
        with connection:
            left = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
            while left > 0:
                connection.sendall(data[:left] if left < len(data) else data)
                left -= len(data)
