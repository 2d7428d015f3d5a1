"""What either end of the KV stream counts."""

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from colm.errors import ColmError

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)
"""Buckets of times that grow with a prompt: from 16 tokens to a million."""
_BETWEEN_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")


def outcome_of(error: BaseException) -> str:
    """The label `outcome` of what ended with an error: `cancelled`, one of ours (`peer_unavailable`), or `failed`."""
    match error:
        case asyncio.CancelledError() | GeneratorExit():
            return "cancelled"
        case ColmError():
            return _BETWEEN_WORDS.sub("_", type(error).__name__).lower()
        case _:
            return "failed"


@dataclass(slots=True)
class StreamCount:
    """What one stream has brought so far."""

    num_tiles: int = 0
    payload_bytes: int = 0
    shared_bytes: int = 0
    """Of those, bytes through shared memory."""
    outcome: str = "complete"
    """If no error says another one."""


class KvStreamMetrics:
    """Counts KV streams, each of which is one attempt of a transfer. Any thread may use it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter(
            "colm_kv_streams_started", "KV streams that began; a transfer may take several.", registry=registry
        )
        self._resumed = Counter(
            "colm_kv_streams_resumed", "Of those, streams that went on where another one had ended.", registry=registry
        )
        self._ended = Counter(
            "colm_kv_streams_ended", "KV streams that ended, by how they did.", ["outcome"], registry=registry
        )
        self._bytes = Counter("colm_kv_bytes", "Bytes of keys and values, as they were sent.", registry=registry)
        self._shared_bytes = Counter(
            "colm_kv_shared_bytes", "Of those, bytes that went through shared memory.", registry=registry
        )
        self._tiles = Counter("colm_kv_tiles", "Tiles that crossed the wire, each one message.", registry=registry)
        self._seconds = Histogram(
            "colm_kv_stream_seconds",
            "From a KV stream's beginning to its end, its wait for the engine included.",
            buckets=SECONDS,
            registry=registry,
        )

    @contextmanager
    def stream(self, *, is_resumed: bool) -> Iterator[StreamCount]:
        """Count the stream that lasts as long as the block, whose caller keeps the count that is yielded."""
        self._started.inc()
        if is_resumed:
            self._resumed.inc()
        count, began_s = StreamCount(), time.monotonic()
        try:
            yield count
        except BaseException as err:
            count.outcome = outcome_of(err)
            raise
        finally:
            self._ended.labels(count.outcome).inc()
            self._bytes.inc(count.payload_bytes)
            self._shared_bytes.inc(count.shared_bytes)
            self._tiles.inc(count.num_tiles)
            self._seconds.observe(time.monotonic() - began_s)
