"""Bytes per second of the KV stream between two processes: `python -m bench.kv_stream --json`.

First from a prefill node's engine to a decode node's pages, by every way there is, next to raw gRPC, a TCP socket and
memory; then the codec next to protobuf's generated classes. What is wanted: one stream at least 0.85x of raw gRPC at
its best message size, TLS on both; shared memory at least 2x the best stream.
"""

from bench.harness.contest import Case
from bench.harness.suite import Options, arguments, positive, run
from bench.kv_stream.codec import StreamCase
from bench.kv_stream.sender import FORMAT
from bench.kv_stream.transports import TransportCase
from colm.allocator import keep_freed_memory


class StreamOptions(Options):
    """Options of this benchmark."""

    mib: int
    message_kib: list[int]
    codec_kib: list[int]


def main() -> None:
    """Run the transports, then the codec with every size of a message."""
    parser = arguments("bench.kv_stream", __doc__)
    parser.add_argument("--mib", type=positive, default=256, help="MiB sent in each turn; 256")
    sizes = [256, 512, 1024, 2048, 4096]
    parser.add_argument("--message-kib", type=positive, nargs="+", default=sizes, metavar="KIB", help="of raw gRPC")
    codec_sizes = [256, 1024, 4096]
    parser.add_argument(
        "--codec-kib", type=positive, nargs="*", default=codec_sizes, metavar="KIB", help="of the codec"
    )
    options = parser.parse_args(namespace=StreamOptions())
    keep_freed_memory()
    cases: list[Case] = [
        TransportCase(
            num_tokens=max(1, (options.mib << 20) // FORMAT.token_bytes),
            raw_message_bytes=tuple(kib << 10 for kib in options.message_kib),
        )
    ]
    cases += [
        StreamCase(message_bytes=kib << 10, num_messages=max(1, (options.mib << 10) // kib))
        for kib in options.codec_kib
    ]
    run(cases, options)


if __name__ == "__main__":
    main()
