"""One prompt through a prefill node in a process of its own, read here as a decode node reads it."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from pydantic import ByteSize

from bench.harness.environment import peak_memory_bytes
from bench.kernels.common import gemm_ceiling
from bench.load_by_scale import write_random
from bench.million.node_process import Seen, serve
from bench.million.sink import Sink, check
from bench.prefill.case import GEMM_SHAPES, prompt
from colm.clock import MonotonicClock
from colm.errors import PeerUnavailable
from colm.flops import LayerFlops, causal_attention_flops
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.transformer import slice_config
from colm.placement import CPU, Placement
from colm.request import AttentionMode
from colm.wire.channels import BlockingChannels
from colm.wire.security import Security
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_receiver import KvReceiver
from decode_node.prefill_pool import PrefillLease
from decode_node.transfer_ledger import TransferLedger
from prefill_node.memory import run_bytes
from prefill_node.node import PrefillOptions
from prefill_node.settings import PrefillSettings
from prefill_node.sparse.policy import AuditPolicy, SparsePolicy

SHORT_TOKENS = 2048
START_TIMEOUT_S = 600.0
MAX_ATTEMPTS = 3
_SAMPLE_S = 1.0
_MAX_SAMPLES = 400

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured."""

    preset: str
    config: ChainConfig
    num_tokens: int
    attention: AttentionMode
    policy: SparsePolicy
    audit: AuditPolicy
    dtype: torch.dtype
    tile_tokens: int
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells a cell from another in the records."""
        sparse = {"mass": self.policy.mass, "keys_per_row": self.policy.keys_per_row, "audit_floor": self.audit.floor}
        return {
            "preset": self.preset,
            "num_tokens": self.num_tokens,
            "attention": self.attention,
            "tile_tokens": self.tile_tokens,
            "seed": self.seed,
        } | (sparse if self.attention == "sparse" else {})

    @property
    def chain1(self) -> ChainConfig:
        """The model that the node serves: chain 1 is all that a prefill reads."""
        return slice_config(self.config, 1)


@dataclass(kw_only=True)
class Resident:
    """A process's resident memory over time, taken until `stop`."""

    pid: int
    samples: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ends = threading.Event()
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        process = psutil.Process(self.pid)
        while not self._ends.is_set():
            self.samples.append((time.monotonic() - self._began_s, process.memory_info().rss))
            self._ends.wait(_SAMPLE_S)

    def stop(self) -> list[tuple[float, int]]:
        """(seconds, bytes), evenly thinned."""
        self._ends.set()
        self._thread.join()
        step = -(-len(self.samples) // _MAX_SAMPLES)
        return [(round(at_s, 1), size) for at_s, size in self.samples[::step]]


@dataclass(frozen=True)
class Node:
    """A running node."""

    address: str
    fingerprint: str
    pid: int
    pipe: Connection

    def seen(self) -> Seen:
        """What it did since the last call."""
        self.pipe.send(True)
        seen: Seen = self.pipe.recv()
        return seen


@contextmanager
def node_of(cell: Cell) -> Iterator[Node]:
    """A prefill node with random weights, for as long as the context lasts."""
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="colm-million-") as folder:
        write_random(Path(folder) / "model", cell.chain1, cell.seed)
        options = PrefillOptions(
            model_path=str(Path(folder) / "model"),
            placement=Placement(device=CPU, dtype=cell.dtype, num_threads=torch.get_num_threads()),
            settings=PrefillSettings(
                tile_tokens=cell.tile_tokens,
                sparse_mass=cell.policy.mass,
                sparse_keys_per_row=cell.policy.keys_per_row,
                sparse_dense_below_tokens=cell.policy.dense_below_tokens,
                audit_floor=cell.audit.floor,
                prefix_cache_bytes=ByteSize(0),  # every prompt is computed
            ),
        )
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(options, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            if not mine.poll(START_TIMEOUT_S):
                raise TimeoutError(f"the node was not ready within {START_TIMEOUT_S} s")
            address, fingerprint = mine.recv()
            assert process.pid is not None
            yield Node(address, fingerprint, process.pid, mine)
        finally:
            process.terminate()
            process.join()


@dataclass(kw_only=True)
class Transfer:
    """One prompt on its way from the node into a sink; broken streams are resumed by the node's lease."""

    node: Node
    token_ids: NDArray[np.int64]
    attention: AttentionMode
    sink: Sink
    name: str

    def __post_init__(self) -> None:
        num_layers = self.sink.layout.kv_format.num_layers
        self.ledger = TransferLedger(transfer_id=self.name, num_layers=num_layers, num_tokens=len(self.token_ids))
        self.num_streams = 0
        self.took_s = 0.0
        self.payload_bytes = 0

    def run(self) -> None:
        """Read to the end.

        Raises:
            PeerUnavailable: the stream broke too often.
        """
        began_s = time.perf_counter()
        channels = BlockingChannels(Security())
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            self.ledger.begin()
            self.num_streams += 1
            transfer = KvTransfer(
                ledger=self.ledger,
                fingerprint=self.node.fingerprint,
                token_ids=self.token_ids,
                table_M=np.zeros(0, dtype=np.int32),
                attention=self.attention,
            )
            lease = PrefillLease(address=self.node.address, lease_id="")
            receiver = KvReceiver(transfer, lease, self.sink, channels, Security(), MonotonicClock())
            try:
                receiver.run()
                break
            except PeerUnavailable:
                if not attempts_left:
                    raise
            finally:
                self.payload_bytes += self.ledger.payload_bytes
        self.took_s = time.perf_counter() - began_s


def needed_flops(cell: Cell, densities: dict[int, float]) -> int:
    """Products that the prompt needs: all linears, and attention to what each layer's plan lists, all where none is."""
    layer, config, num_tokens = LayerFlops.of(cell.config), cell.config, cell.num_tokens
    causal = causal_attention_flops(
        num_queries=num_tokens, num_keys=num_tokens, num_heads=config.chains[0], head_dim=config.head_dim
    )
    num_whole = config.num_layers - 1
    linear = num_tokens * (config.num_layers * layer.keys_values + num_whole * layer.rest)
    return linear + int(causal * sum(densities.get(each, 1.0) for each in range(num_whole)))


def gemm_flops_per_s(dtype: torch.dtype) -> float:
    """What the best of a few matrix products reaches now."""
    turns = [gemm_ceiling(dtype, *shape) for shape in GEMM_SHAPES]
    return max(mean(turn()["gflops_per_s"] for _ in range(5)) for turn in turns) * 1e9


def measure(cell: Cell, progress: Progress) -> dict[str, Any]:
    """Run a cell: the long prompt, and a short one that comes when half of the long one has arrived.

    Returns:
        Its record's metrics.

    Raises:
        AssertionError: something that came is wrong.
    """
    kv_format = KvFormat.of(cell.config, cell.dtype)
    token_ids = prompt(cell.chain1, cell.num_tokens, cell.seed)
    sink, short_sink = Sink(kv_format, cell.num_tokens), Sink(kv_format, SHORT_TOKENS)
    with node_of(cell) as node, ThreadPoolExecutor(2) as threads:
        short_ids = prompt(cell.chain1, SHORT_TOKENS, cell.seed + 1)
        alone = Transfer(node=node, token_ids=short_ids, attention="dense", sink=short_sink, name="alone")
        alone.run()  # and what libraries set up once
        node.seen()
        gemm_before = gemm_flops_per_s(cell.dtype)
        resident = Resident(pid=node.pid)
        long = Transfer(node=node, token_ids=token_ids, attention=cell.attention, sink=sink, name="long")
        short = Transfer(node=node, token_ids=short_ids, attention="dense", sink=short_sink, name="short")
        reading = threads.submit(long.run)
        in_the_middle = None
        while not reading.done():
            progress(long.ledger.num_tokens_done)
            if in_the_middle is None and 2 * long.ledger.num_tokens_done >= cell.num_tokens:
                in_the_middle = threads.submit(short.run)
            time.sleep(0.2)
        reading.result()
        progress(cell.num_tokens)
        if in_the_middle is not None:
            in_the_middle.result()
        curve, seen = resident.stop(), node.seen()
        node_peak_bytes = peak_memory_bytes(node.pid)
        gemm_after = gemm_flops_per_s(cell.dtype)
    checked = check(sink, cell.chain1, token_ids, cell.seed, last_rows=cell.num_tokens > SHORT_TOKENS)
    if seen.num_checked_rows:
        checked.append(f"sparse attention of {seen.num_checked_rows} rows over their own index, in the node")
    is_sparse = cell.attention == "sparse"
    flops = needed_flops(cell, seen.densities if is_sparse else {})
    gemm, tile_s = (
        max(gemm_before, gemm_after),
        long.took_s / (kv_format.num_layers * -(-cell.num_tokens // cell.tile_tokens)),
    )
    bar_s, short_bar_s = flops / (0.6 * gemm), max(3.0, 3 * tile_s)
    return {
        "total_s": long.took_s,
        "bar_s": bar_s,
        "needed_gflops": flops / 1e9,
        "gemm_gflops_per_s": gemm / 1e9,
        "gemm_before_after_gflops_per_s": [gemm_before / 1e9, gemm_after / 1e9],
        "gemm_fraction": flops / long.took_s / gemm,
        "tokens_per_s": cell.num_tokens / long.took_s,
        "payload_bytes": long.payload_bytes,
        "num_kv_streams": long.num_streams,
        "short_s": short.took_s,
        "short_alone_s": alone.took_s,
        "short_bar_s": short_bar_s,
        "mean_tile_s": tile_s,
        "node_peak_bytes": node_peak_bytes,
        "node_run_predicted_bytes": run_bytes(
            cell.config, cell.dtype, num_tokens=cell.num_tokens, tile_tokens=cell.tile_tokens
        ),
        "densities": {str(layer): round(each, 5) for layer, each in sorted(seen.densities.items())},
        "met": {
            "total": long.took_s <= bar_s,
            "short": short.took_s <= short_bar_s,
            "memory": node_peak_bytes < 6 << 30,
        },
        "checked": checked,
        "resident_bytes_over_s": curve,
    }
