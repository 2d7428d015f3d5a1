"""The KV stream of a prefill and a decode node, next to what carries it: gRPC, TCP and memory."""

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

import grpc
import numpy as np
import torch

from bench.harness.channels import bare_blocking_channel
from bench.harness.contest import Bar, Case, Contest
from bench.kv_stream.sender import FINGERPRINT, FORMAT, RAW, Addresses, random_keys_values, sending
from colm.clock import MonotonicClock
from colm.wire.channels import BlockingChannels
from colm.wire.security import Security, new_tls
from colm.wire.shared_memory import host_id
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_layout import KvLayout
from decode_node.kv_receiver import KvReceiver
from decode_node.kv_store import KvStore
from decode_node.prefill_pool import PrefillLease
from decode_node.transfer_ledger import TransferLedger

LAYOUT: Final = KvLayout(FORMAT, page_tokens=64)
STREAM_OF_GRPC: Final = 0.85
SHARED_OF_STREAM: Final = 2.0
STRIPES: Final = (2, 4)
_SOCKET_BYTES: Final = 1 << 20
_SURELY_SHARED_BYTES: Final = 128 << 20
"""Far more than what is sent before the reader has opened the memory."""


@dataclass(frozen=True, kw_only=True)
class TransportCase(Case):
    """One prompt's keys and values, from engine to pages, and as many bytes by simpler ways."""

    num_tokens: int
    raw_message_bytes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The prompt's length."""
        return f"transports_{self.num_tokens}"

    @property
    def num_bytes(self) -> int:
        """Of each turn."""
        return self.num_tokens * FORMAT.token_bytes

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """All of them, against one sender."""
        tls = new_tls()
        with sending(self.num_tokens, seed, Security(tls=tls)) as addresses:
            ways = _Ways(self, seed, addresses, Security(tls=tls.for_clients()))
            sizes = {f"{size >> 10}KiB": size for size in self.raw_message_bytes}
            grpc_tls = {f"grpc_tls_{name}": partial(ways.raw, size, is_private=True) for name, size in sizes.items()}
            streams = {
                "stream": partial(ways.stream, is_private=False),
                "stream_tls": partial(ways.stream, is_private=True),
            }
            shared = "shared_memory_tls"
            of_grpc = Bar("stream_over_grpc", ["stream_tls"], over=list(grpc_tls), at_least=STREAM_OF_GRPC)
            of_stream = Bar("shared_memory_over_stream", [shared], over=list(streams), at_least=SHARED_OF_STREAM)
            yield Contest(
                check=ways.check,
                contenders={
                    "memory_copy": ways.copy,
                    "tcp": ways.tcp,
                    **{f"grpc_{name}": partial(ways.raw, size, is_private=False) for name, size in sizes.items()},
                    **grpc_tls,
                    **{
                        f"grpc_tls_{num}_channels": partial(ways.raw, 1 << 20, is_private=True, num_channels=num)
                        for num in STRIPES
                    },
                    **streams,
                    shared: partial(ways.stream, is_private=True, is_shared=True),
                },
                bars=(of_grpc, of_stream),
                compared_by="gb_per_s",
            )


class _Ways:
    """What takes turns."""

    def __init__(self, case: TransportCase, seed: int, addresses: Addresses, security: Security) -> None:
        self._case = case
        self._addresses = addresses
        self._security = security
        self._keys_values = random_keys_values(case.num_tokens, seed)
        self._source, self._target = (np.zeros(64 << 20, dtype=np.uint8) for _ in range(2))
        num_pages = LAYOUT.pages(case.num_tokens)
        self._store = KvStore(LAYOUT, num_pages)
        self._table_M = np.arange(num_pages, dtype=np.int32)
        self._numbers = count()

    def check(self) -> None:
        """Check that the pages hold what the sender has.

        Raises:
            AssertionError: they do not.
        """
        for is_shared in (False, True):
            self._store.k_pages_LBPKD.zero_()
            self._store.v_pages_LBPKD.zero_()
            self.stream(is_private=True, is_shared=is_shared)
            for pages_LBPKD, wanted_KNE in zip(
                (self._store.k_pages_LBPKD, self._store.v_pages_LBPKD), self._keys_values, strict=True
            ):
                for layer_BPKD in pages_LBPKD:
                    stored_KNE = layer_BPKD.flatten(0, 1)[: self._case.num_tokens].transpose(0, 1)
                    assert torch.equal(stored_KNE, wanted_KNE), "the pages hold something else than was sent"

    def copy(self) -> Mapping[str, float]:
        """Copies in this process, each of more than the caches hold."""
        times = max(1, self._case.num_bytes // len(self._source))

        def work() -> None:
            for _ in range(times):
                np.copyto(self._target, self._source)

        return self._timed(work, times * len(self._source))

    def tcp(self) -> Mapping[str, float]:
        """A socket, read into one buffer."""
        buffer = bytearray(_SOCKET_BYTES)
        with socket.create_connection(self._addresses.tcp) as connection:

            def work() -> None:
                left = self._case.num_bytes
                connection.sendall(left.to_bytes(8, "little"))
                while left and (num_read := connection.recv_into(buffer)):
                    left -= num_read
                assert not left

            return self._timed(work)

    def raw(self, message_bytes: int, *, is_private: bool, num_channels: int = 1) -> Mapping[str, float]:
        """Messages of bytes, which nobody looks at, over one connection or divided among several."""
        address, security = self._end(is_private)
        times = max(1, self._case.num_bytes // message_bytes // num_channels)

        def read(channel: grpc.Channel) -> int:
            call = channel.unary_stream(RAW)
            return sum(len(message) for message in call(b"%d,%d" % (message_bytes, times)))

        with ExitStack() as stack:
            channels = [stack.enter_context(bare_blocking_channel(address, security)) for _ in range(num_channels)]
            readers = stack.enter_context(ThreadPoolExecutor(num_channels))
            for channel in channels:
                grpc.channel_ready_future(channel).result()

            def work() -> None:
                assert sum(readers.map(read, channels)) == num_channels * times * message_bytes

            return self._timed(work, num_channels * times * message_bytes)

    def stream(self, *, is_private: bool, is_shared: bool = False) -> Mapping[str, float]:
        """From the engine's output to the pages, as between the nodes; headers alone over the stream if shared."""
        address, security = self._end(is_private)
        channels = BlockingChannels(security)
        with channels.use(address) as channel:
            grpc.channel_ready_future(channel).result()
        ledger = TransferLedger(
            transfer_id=f"bench-{next(self._numbers)}", num_layers=FORMAT.num_layers, num_tokens=self._case.num_tokens
        )
        ledger.begin()
        transfer = KvTransfer(
            ledger=ledger,
            fingerprint=FINGERPRINT,
            token_ids=np.zeros(self._case.num_tokens, dtype=np.int64),
            table_M=self._table_M,
        )
        lease = PrefillLease(address=address, lease_id="")
        host = host_id() if is_shared else ""
        receiver = KvReceiver(transfer, lease, self._store, channels, security, MonotonicClock(), host)
        try:
            seen = self._timed(receiver.run)
        finally:
            channels.close()
        assert ledger.is_whole
        assert ledger.payload_bytes == self._case.num_bytes
        if not is_shared or self._case.num_bytes >= _SURELY_SHARED_BYTES:
            assert (2 * ledger.shared_bytes > self._case.num_bytes) == is_shared
        return seen

    def _end(self, is_private: bool) -> tuple[str, Security]:
        return (self._addresses.tls, self._security) if is_private else (self._addresses.plain, Security())

    def _timed(self, work: Callable[[], None], num_bytes: int | None = None) -> Mapping[str, float]:
        began_s = time.perf_counter()
        work()
        return {"gb_per_s": (num_bytes or self._case.num_bytes) / (time.perf_counter() - began_s) / 1e9}
