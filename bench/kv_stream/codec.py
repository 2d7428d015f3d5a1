"""The KV stream's codec over loopback gRPC, next to protobuf's generated classes.

A server process sends the same tile again and again; this process reads, verifies and stores it as a decode node does.
Contenders run in turn: our codec, acknowledged as between the nodes, without and with TLS; the same without a word from
the reader; and protobuf's generated classes for the same messages.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import grpc
import numpy as np
import torch
import xxhash

from bench.harness.channels import bare_blocking_channel
from bench.harness.contest import Case, Contest
from bench.harness.environment import peak_memory_bytes
from colm.kv import KvFormat, KvTile
from colm.kv_position import KV_START
from colm.wire.endpoint import bind, create_server
from colm.wire.security import Security, new_tls
from colm.wire.tile_codec import (
    METHOD,
    SERVICE,
    WINDOW_BYTES,
    decode_message,
    decode_tile,
    encode_tile,
    require_intact,
    require_tile,
)
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_layout import KvLayout
from decode_node.kv_requests import KvRequests
from decode_node.kv_store import KvStore
from decode_node.transfer_ledger import TransferLedger

FORMAT = KvFormat(num_layers=1, num_kv_heads=8, head_dim=64, dtype=torch.bfloat16)
LAYOUT = KvLayout(FORMAT, page_tokens=64)
START_TIMEOUT_S = 60


class Codec(NamedTuple):
    """Both ends of a message."""

    encode: Callable[[KvTile], bytes]
    decode: Callable[[bytes], tuple[pb.PullKvResponse, memoryview]]


@dataclass(frozen=True, kw_only=True)
class StreamCase(Case):
    """Messages of one size."""

    message_bytes: int
    num_messages: int

    @property
    def name(self) -> str:
        """Its size and their number."""
        return f"kv_stream_{self.message_bytes >> 10}KiB_m{self.num_messages}"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Our codec, the same with TLS and without acknowledgements, and the generated classes."""
        tile, tls = tile_of(self.message_bytes, seed), new_tls()
        server, client = Security(tls=tls), Security(tls=tls.for_clients())
        stream = partial(_stream, self, seed)
        yield Contest(
            check=partial(check, tile),
            contenders={
                "ours": partial(stream, "ours", True, Security(), Security()),
                "ours_tls": partial(stream, "ours", True, server, client),
                "ours_unacknowledged": partial(stream, "ours", False, Security(), Security()),
                "protobuf": partial(stream, "protobuf", False, Security(), Security()),
            },
            ours="ours",
            against=("protobuf", "ours_tls", "ours_unacknowledged"),
            compared_by="gb_per_s",
        )


def tile_of(message_bytes: int, seed: int) -> KvTile:
    """Random keys and values of about that size."""
    shape = (FORMAT.num_kv_heads, message_bytes // FORMAT.layer_token_bytes, FORMAT.head_dim)
    generator = torch.Generator().manual_seed(seed)
    return KvTile(0, 0, *(torch.randn(shape, generator=generator).to(FORMAT.dtype) for _ in range(2)))


def payload_of(tile: KvTile) -> bytes:
    """The bytes of a tile's keys and values on the wire."""
    return b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in (tile.k_KTD, tile.v_KTD))


def encode_generated(tile: KvTile) -> bytes:
    """The same message through the generated class, with the copies that it makes."""
    payload = payload_of(tile)
    header = pb.TileHeader(
        num_tokens=tile.num_tokens, codec=common_pb2.CODEC_RAW, checksum=xxhash.xxh3_64_intdigest(payload)
    )
    return pb.PullKvResponse(tile=header, payload=payload).SerializeToString()


def decode_generated(data: bytes) -> tuple[pb.PullKvResponse, memoryview]:
    """The receiving half of `encode_generated`."""
    message = pb.PullKvResponse.FromString(data)
    return message, memoryview(message.payload)


CODECS = {
    "ours": Codec(partial(encode_tile, transfer_id="bench", epoch=1), decode_message),
    "protobuf": Codec(encode_generated, decode_generated),
}


def check(tile: KvTile) -> None:
    """Check that each codec carries the tile bit by bit.

    Raises:
        AssertionError: a codec changes it.
    """
    for name, codec in CODECS.items():
        message, payload = codec.decode(codec.encode(tile))
        assert payload == payload_of(tile), f"{name} carries other bytes than the tile's"
        decode_tile(message.tile, payload, FORMAT)  # raises where the checksum is another one


def send(case: StreamCase, seed: int, codec: str, is_acknowledged: bool, security: Security, port: Connection) -> None:
    """The sender's process: says its port and answers until it is ended."""
    asyncio.run(_serve(case, seed, codec, is_acknowledged, security, port))


async def _serve(
    case: StreamCase, seed: int, codec: str, is_acknowledged: bool, security: Security, port: Connection
) -> None:
    tile, encode = tile_of(case.message_bytes, seed), CODECS[codec].encode

    async def pull(requests: AsyncIterator[pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        num_stored, news = 0, asyncio.Event()

        async def listen() -> None:
            nonlocal num_stored
            async for request in requests:
                position = request.acknowledged
                num_stored = max(num_stored, position.layer * case.num_messages + position.token)
                news.set()

        listening = asyncio.create_task(listen())
        for num_sent in range(case.num_messages):
            while is_acknowledged and (num_sent - num_stored) * case.message_bytes >= WINDOW_BYTES:
                news.clear()
                await news.wait()
            await context.write(encode(tile))
        await listening

    server = create_server(security)
    handler = grpc.stream_stream_rpc_method_handler(pull, pb.PullKvRequest.FromString, None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    bound = bind(server, "127.0.0.1", 0, security)
    await server.start()
    port.send(bound)
    await server.wait_for_termination()


def _stream(
    case: StreamCase, seed: int, codec: str, is_acknowledged: bool, server: Security, client: Security
) -> dict[str, float]:
    """One turn: a sender in a process of its own, and its whole stream."""
    spawn = get_context("spawn")
    mine, theirs = spawn.Pipe(duplex=False)
    sender = spawn.Process(target=send, args=(case, seed, codec, is_acknowledged, server, theirs), daemon=True)
    sender.start()
    theirs.close()  # the pipe ends with the sender
    try:
        if not mine.poll(START_TIMEOUT_S):
            raise TimeoutError(f"the sender said no port within {START_TIMEOUT_S} s")
        address = f"127.0.0.1:{mine.recv()}"
        seconds = receive(case, address, CODECS[codec].decode, is_acknowledged, client)
        assert sender.pid is not None
        return {
            "gb_per_s": case.num_messages * case.message_bytes / seconds / 1e9,
            "sender_peak_bytes": peak_memory_bytes(sender.pid),
        }
    finally:
        sender.terminate()
        sender.join()


def receive(
    case: StreamCase,
    address: str,
    decode: Callable[[bytes], tuple[pb.PullKvResponse, memoryview]],
    is_acknowledged: bool,
    security: Security,
) -> float:
    """Read, verify and store the whole stream; returns the seconds it took."""
    num_pages = LAYOUT.pages(case.message_bytes // FORMAT.layer_token_bytes)
    store, pages = KvStore(LAYOUT, num_pages), np.arange(num_pages, dtype=np.int32)
    ledger = TransferLedger(transfer_id="bench", num_layers=1, num_tokens=case.num_messages)
    transfer = KvTransfer(ledger=ledger, fingerprint="", token_ids=np.zeros(1, dtype=np.int64), table_M=pages)
    requests, stored = KvRequests(transfer, "", lambda: None), KV_START
    with bare_blocking_channel(address, security) as channel:
        grpc.channel_ready_future(channel).result(timeout=START_TIMEOUT_S)
        start = time.perf_counter()
        count = 0
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}", pb.PullKvRequest.SerializeToString, None)
        if not is_acknowledged:
            requests.close()
        for data in call(iter(requests)):
            message, payload = decode(data)
            header = message.tile
            require_tile(header, payload, FORMAT, "raw")
            checksum = store.write_payload(pages, KV_START, header.num_tokens, payload, "raw", is_shared=False)
            require_intact(header, checksum)
            count += 1
            if is_acknowledged:
                stored = stored.after(1, case.num_messages)
                requests.stored(stored, len(payload), is_last=count == case.num_messages)
                if count == case.num_messages:
                    requests.close()
        elapsed_s = time.perf_counter() - start
    assert count == case.num_messages, f"{count} of {case.num_messages} messages came"
    return elapsed_s
