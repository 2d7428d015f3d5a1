"""Bytes per second of the KV stream over loopback gRPC: `python -m bench.kv_stream --json`.

A server process sends the same tile again and again; this process reads, verifies and stores it as a decode node does.
Contenders run in turn: our codec without and with TLS, and protobuf's generated classes for the same messages.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import grpc
import numpy as np
import torch
import xxhash

from bench.record import environment
from colm.kv import KvFormat, KvTile
from colm.node_cli import read_security
from colm.wire.endpoint import bind, create_server, open_blocking_channel
from colm.wire.security import Security, Tls, new_tls
from colm.wire.tile_codec import METHOD, SERVICE, decode_message, decode_tile, encode_tile
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore

SEED = 0
MESSAGE_KIB = (256, 1024, 4096)
CODECS = ("ours", "ours_tls", "protobuf")
FORMAT = KvFormat(num_layers=1, num_kv_heads=8, head_dim=64, dtype=torch.bfloat16)
LAYOUT = KvLayout(FORMAT, page_tokens=64)


def tile_of(message_kib: int) -> KvTile:
    """Random keys and values of about that size."""
    num_tokens = (message_kib << 10) // FORMAT.layer_token_bytes
    shape = (FORMAT.num_kv_heads, num_tokens, FORMAT.head_dim)
    generator = torch.Generator().manual_seed(SEED)
    return KvTile(0, 0, *(torch.randn(shape, generator=generator).to(FORMAT.dtype) for _ in range(2)))


def encode_generated(tile: KvTile) -> bytes:
    """The same message through the generated class, with the copies that it makes."""
    payload = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in (tile.k_KTD, tile.v_KTD))
    header = pb.TileHeader(num_tokens=tile.num_tokens, codec=pb.CODEC_RAW, checksum=xxhash.xxh3_64_intdigest(payload))
    return pb.PullKvResponse(tile=header, payload=payload).SerializeToString()


def decode_generated(data: bytes) -> tuple[pb.PullKvResponse, memoryview]:
    """The receiving half of `encode_generated`."""
    message = pb.PullKvResponse.FromString(data)
    return message, memoryview(message.payload)


async def serve(codec: str, message_kib: int, num_messages: int, tls_dir: Path | None) -> None:
    """The sender's process: prints its port and answers until it is ended."""
    security = read_security(None, tls_dir)
    tile = tile_of(message_kib)
    encode: Callable[[], bytes] = (
        (lambda: encode_generated(tile))
        if codec == "protobuf"
        else (lambda: encode_tile(tile, transfer_id="bench", epoch=1))
    )

    async def pull(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        for _index in range(num_messages):
            await context.write(encode())

    server = create_server(security)
    handler = grpc.stream_stream_rpc_method_handler(pull, None, None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    sys.stdout.write(f"{bind(server, '127.0.0.1', 0, security)}\n")
    sys.stdout.flush()
    await server.start()
    await server.wait_for_termination()


@contextmanager
def sender(codec: str, message_kib: int, num_messages: int, tls_dir: Path) -> Iterator[str]:
    """A sender in a process of its own; yields its address."""
    words = ["--serve", codec, "--kib", str(message_kib), "--messages", str(num_messages), "--tls-dir", str(tls_dir)]
    process = subprocess.Popen([sys.executable, "-m", "bench.kv_stream", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait()


def receive(address: str, codec: str, security: Security, num_messages: int) -> float:
    """Read, verify and store the whole stream; seconds."""
    decode = decode_generated if codec == "protobuf" else decode_message
    num_pages = LAYOUT.pages((max(MESSAGE_KIB) << 10) // FORMAT.layer_token_bytes)
    store, pages = KvStore(LAYOUT, num_pages), np.arange(num_pages, dtype=np.int32)
    with open_blocking_channel(address, security) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        started_s = time.monotonic()
        count = 0
        for data in channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)(iter(())):
            message, payload = decode(data)
            store.write(pages, decode_tile(message.tile, payload, FORMAT))
            count += 1
        elapsed_s = time.monotonic() - started_s
    if count != num_messages:
        raise AssertionError(f"{count} of {num_messages} messages came")
    return elapsed_s


def measure(message_kib: int, num_bytes: int, num_rounds: int, tls_dir: Path, tls: Tls) -> dict[str, object]:
    """All codecs in turn, round after round: GB/s by codec."""
    num_messages = num_bytes // (message_kib << 10)
    rates: dict[str, list[float]] = {codec: [] for codec in CODECS}
    for _ in range(num_rounds):
        for codec in CODECS:
            secure = codec == "ours_tls"
            with sender(codec, message_kib, num_messages, tls_dir if secure else Path()) as address:
                security = Security(tls=tls.for_clients() if secure else None)
                seconds = receive(address, codec, security, num_messages)
            rates[codec].append(num_messages * (message_kib << 10) / seconds / 1e9)
    metrics: dict[str, object] = {
        f"{codec}_gb_per_s": {"median": median(values), "min": min(values), "max": max(values), "n": num_rounds}
        for codec, values in rates.items()
    }
    return metrics | {"ours_over_protobuf_x": median(rates["ours"]) / median(rates["protobuf"])}


def main() -> None:
    """Measure; the last line of stdout is the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv_stream", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON record")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each size")
    parser.add_argument("--mib", type=int, default=512, help="MiB sent in each round")
    parser.add_argument("--serve", choices=CODECS, help=argparse.SUPPRESS)
    parser.add_argument("--kib", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--messages", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tls-dir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        tls_dir = options.tls_dir if options.serve == "ours_tls" else None
        asyncio.run(serve(options.serve, options.kib, options.messages, tls_dir))
        return
    record = environment(" ".join(["python", "-m", "bench.kv_stream", *sys.argv[1:]]), SEED) | {"cases": []}
    tls = new_tls()
    with TemporaryDirectory() as folder:
        for name in ("ca", "cert", "key"):
            (Path(folder) / f"{name}.pem").write_bytes(getattr(tls, f"{name}_pem"))
        for message_kib in MESSAGE_KIB:
            metrics = measure(message_kib, options.mib << 20, options.rounds, Path(folder), tls)
            record["cases"].append({"message_kib": message_kib, "metrics": metrics})
            cells = (f"{k}={v['median'] if isinstance(v, dict) else v:.2f}" for k, v in metrics.items())
            sys.stdout.write(f"{message_kib:>5} KiB  {'  '.join(cells)}\n")
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
