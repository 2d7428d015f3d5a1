"""Nodes in this process, over real sockets, and a prefill node whose stream can be spoilt."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import torch

from colm.clock import MonotonicClock
from colm.kv import KvFormat
from colm.leases import LeaseTable
from colm.model.config import ChainConfig
from colm.placement import Placement
from colm.sampling import SamplingParams
from colm.settings import Settings
from colm.wire.endpoint import bind, create_server, open_channel
from colm.wire.messages import sampling_to_pb, token_id_pieces
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.tile_codec import METHOD, SERVICE, decode_message, pull_kv_handlers
from colm.wire.v1 import common_pb2, decode_service_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as kv_pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from decode_node.kv_layout import KvLayout
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import StaticPrefillPool
from decode_node.settings import DecodeSettings, KvCacheDtype
from prefill_node.node import PrefillNode, PrefillOptions
from prefill_node.settings import PrefillSettings
from tests.gates import LIMIT_S

PAGE_TOKENS = 16
TILE_TOKENS = 31  # so that tiles begin and end inside pages


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# A machine without IPv6 runs the same tests over IPv4; how addresses are written is tested without a network.
LOOPBACK, EVERYWHERE = ("::1", "::") if _has_ipv6() else ("127.0.0.1", "0.0.0.0")

PLACEMENT = Placement.of("cpu", "float32", num_threads=1)

Spoil = Callable[[int, int, bytes], list[bytes] | None]
"""(attempt, message number, message) -> the message to send instead; None breaks the stream off there."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All events of a decode call."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    responses: tuple[decode_service_pb2.DecodeResponse, ...]

    @property
    def usage(self) -> common_pb2.Usage:
        return self.responses[-1].finished.usage

    @property
    def timings(self) -> common_pb2.Timings:
        return self.responses[-1].finished.timings

    @property
    def waits(self) -> list[tuple[int, int]]:
        """(what the request waited for, how many were ahead), for each `Queued` event."""
        queued = [response.queued for response in self.responses if response.WhichOneof("event") == "queued"]
        return [(event.waits_for, event.num_ahead) for event in queued]


def _split(options: dict[str, Any], kind: type[Settings]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those options that settings have, and the others."""
    settings = {name: value for name, value in options.items() if name in kind.model_fields}
    return settings, {name: value for name, value in options.items() if name not in settings}


@asynccontextmanager
async def prefill_node(
    model_path: str, security: Security | None = None, leases: LeaseTable | None = None, **options: Any
) -> AsyncIterator[PrefillNode]:
    """A node that sends every payload over its stream, where tests can spoil it, and computes every prompt anew, unless
    the options say otherwise."""
    settings, others = _split({"shared_memory": "off", "prefix_cache_bytes": 0} | options, PrefillSettings)
    chosen = PrefillOptions(
        model_path=model_path,
        **{"placement": PLACEMENT, "settings": PrefillSettings(**{"tile_tokens": TILE_TOKENS, **settings}), **others},
    )
    node = PrefillNode(chosen, security or Security(), leases)
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


@asynccontextmanager
async def decode_node(
    model_path: str,
    prefill_addresses: Sequence[str],
    security: Security | None = None,
    leases: LeaseTable | None = None,
    **options: Any,
) -> AsyncIterator[DecodeNode]:
    """Run a decode node; at the end of the block it must hold nothing."""
    settings, others = _split(options, DecodeSettings)
    # Answers whose gateway was lost are not held, unless a test asks for that: the block would wait for their end.
    # Tests that ask the same twice want it brought twice, unless they say otherwise. A budget that is measured would
    # be another on each machine.
    defaults = {
        "page_tokens": PAGE_TOKENS,
        "kv_cache_bytes": 16 << 20,
        "orphan_s": 0,
        "prefix_cache_bytes": 0,
        "step_tokens": 64,
    }
    chosen = DecodeOptions(
        model_path=model_path,
        **{"placement": PLACEMENT, "settings": DecodeSettings(**{**defaults, **settings}), **others},
    )
    node = DecodeNode(chosen, security or Security(), StaticPrefillPool(prefill_addresses, MonotonicClock()), leases)
    await node.start()
    try:
        yield node
        await until_idle(node)
    finally:
        await node.stop()


def pages_bytes(config: ChainConfig, num_pages: int, cache_dtype: KvCacheDtype = "model") -> int:
    """Bytes of a cache of that many pages, on the nodes of this file."""
    return num_pages * KvLayout(KvFormat.of(config, torch.float32), PAGE_TOKENS, cache_dtype).page_bytes


def assert_nothing_held(node: DecodeNode) -> None:
    node.page_line.pool.check_integrity()
    assert node.page_line.pool.num_used == 0
    assert not node.page_line.num_waiting
    assert not node.owner.stages()
    assert not len(node.answers)


async def until_idle(node: DecodeNode) -> None:
    """Wait until the node holds nothing, as it must soon after a call has ended."""
    give_up_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return assert_nothing_held(node)
        except AssertionError:
            if time.monotonic() > give_up_s:
                raise
        await asyncio.sleep(0.02)


async def until_prefill_idle(node: PrefillNode) -> None:
    """Wait until the node has no job, and so no window, no memory and no lease, and its engine makes no step."""
    async with asyncio.timeout(LIMIT_S):
        while node.service._loop._jobs or node.service.load.num_active:  # a step outlives the job that was given up
            await asyncio.sleep(0.02)
    assert node.service.load.num_queued == 0


def decode_requests(
    token_ids: Sequence[int],
    *,
    request_id: str = "r",
    num_chains: int = 1,
    max_new_tokens: int = 8,
    made_token_ids: Sequence[int] = (),
    sampling: SamplingParams | None = None,
    only_if_room: bool = False,
    lease_id: str = "",
    attention: common_pb2.AttentionMode = common_pb2.ATTENTION_MODE_UNSPECIFIED,
    kv_codec: common_pb2.Codec = common_pb2.CODEC_UNSPECIFIED,
    max_draft_tokens: int | None = None,
    cache_salt: bytes = b"",
) -> list[decode_service_pb2.DecodeRequest]:
    opened = decode_service_pb2.OpenDecode(
        request_id=request_id,
        num_chains=num_chains,
        max_new_tokens=max_new_tokens,
        sampling=sampling_to_pb(sampling or SamplingParams(ignore_eos=True)),
        num_prompt_tokens=len(token_ids),
        num_answer_tokens=len(made_token_ids),
        only_if_room=only_if_room,
        lease_id=lease_id,
        attention=attention,
        kv_codec=kv_codec,
        max_draft_tokens=max_draft_tokens,
        cache_salt=cache_salt,
    )
    all_ids = [*token_ids, *made_token_ids]
    pieces = [decode_service_pb2.DecodeRequest(token_ids=piece) for piece in token_id_pieces(np.array(all_ids))]
    end = decode_service_pb2.DecodeRequest(end_of_prompt=common_pb2.EndOfPrompt())
    return [decode_service_pb2.DecodeRequest(open=opened), *pieces, end]


def pull_kv_requests(
    node: PrefillNode, token_ids: Sequence[int], *, transfer_id: str = "r", epoch: int = 1, **fields: Any
) -> list[kv_pb.PullKvRequest]:
    opened = kv_pb.OpenKvTransfer(
        transfer_id=transfer_id,
        epoch=epoch,
        fingerprint=node.fingerprint,
        num_tokens=len(token_ids),
        **fields,
    )
    pieces = [kv_pb.PullKvRequest(token_ids=piece) for piece in token_id_pieces(np.array(token_ids))]
    end = kv_pb.PullKvRequest(end_of_prompt=common_pb2.EndOfPrompt())
    return [kv_pb.PullKvRequest(open=opened), *pieces, end]


async def decode(
    address: str,
    token_ids: Sequence[int],
    *,
    timeout_s: float | None = 60.0,
    security: Security | None = None,
    **request: object,
) -> Answer:
    """Call a decode node and read its answer to the end."""
    shown = security or Security()
    async with open_channel(address, shown) as channel:
        requests = iter(decode_requests(token_ids, **request))  # type: ignore[arg-type]
        call = DecodeServiceStub(channel).Decode(requests, metadata=shown.metadata(), timeout=timeout_s)
        with Outcome(call).statuses():
            responses = [response async for response in call]
    tokens = [r.token for r in responses if r.WhichOneof("event") == "token"]
    kinds = [r.WhichOneof("event") for r in responses]
    assert kinds.count("finished") == 1
    assert kinds[-1] == "finished"
    assert responses[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH
    return Answer(tuple(token.token_id for token in tokens), tuple(token.logprob for token in tokens), tuple(responses))


def is_reached(data: bytes) -> bool:
    """Whether a message of a KV stream says how far a tile is that has not come yet."""
    return decode_message(data)[0].WhichOneof("event") == "reached"


@asynccontextmanager
async def spoilt_prefill(address: str, spoil: Spoil) -> AsyncIterator[str]:
    """A server between decode node and prefill node that may change, drop or break off messages.

    `reached` passes and is not counted: whether it comes depends on the time that a tile takes.
    """
    attempts = 0

    async def pull_kv(requests: AsyncIterator[kv_pb.PullKvRequest], context: grpc.aio.ServicerContext) -> None:
        nonlocal attempts
        attempts += 1
        attempt = attempts
        async with open_channel(address, Security()) as channel:
            stub = channel.stream_stream(f"/{SERVICE}/{METHOD}", kv_pb.PullKvRequest.SerializeToString, None)
            call = stub(requests)
            try:
                number = 0
                async for message in call:
                    if is_reached(message):
                        await context.write(message)
                        continue
                    changed = spoil(attempt, number, message)
                    if changed is None:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off by the test")
                    for part in changed:
                        await context.write(part)
                    number += 1
            except grpc.aio.AioRpcError as err:
                await context.abort(err.code(), err.details(), tuple(err.trailing_metadata() or ()))
            finally:
                call.cancel()

    server = create_server(Security())
    server.add_generic_rpc_handlers((pull_kv_handlers(pull_kv),))
    port = bind(server, "127.0.0.1", 0, Security())
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
