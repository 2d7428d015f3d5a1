"""A caller of a prefill node that says what its test wants."""

import asyncio
import queue
from collections.abc import Sequence
from itertools import chain
from typing import Any

import grpc
import pytest

from colm.wire.endpoint import open_blocking_channel
from colm.wire.security import Security
from colm.wire.status import error_of
from colm.wire.tile_codec import decode_message, pull_kv_stub
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from prefill_node.node import PrefillNode
from tests.gates import LIMIT_S
from tests.nodes import is_reached, pull_kv_requests


class Caller:
    """A caller of `PullKv` that says what its test wants."""

    def __init__(self, node: PrefillNode, token_ids: Sequence[int], **options: Any) -> None:
        self._words: queue.SimpleQueue[pb.PullKvRequest | None] = queue.SimpleQueue()
        self._channel = open_blocking_channel(node.address, Security())
        asked = pull_kv_requests(node, token_ids, **options)
        self._call = pull_kv_stub(self._channel.__enter__())(chain(asked, iter(self._words.get, None)))

    def acknowledge(self, layer: int, token: int) -> None:
        self._words.put(pb.PullKvRequest(acknowledged=pb.KvPosition(layer=layer, token=token)))

    def say(self, request: pb.PullKvRequest | None) -> None:
        self._words.put(request)

    async def read(self, num_messages: int | None = None) -> list[pb.PullKvResponse]:
        """The next messages, or all there will be; a tile's payload is put back into its message."""

        def take() -> list[pb.PullKvResponse]:
            taken = []
            for data in self._call:
                if is_reached(data):
                    continue
                message, payload = decode_message(data)
                message.payload = bytes(payload)
                taken.append(message)
                if len(taken) == num_messages:
                    break
            return taken

        return await asyncio.wait_for(asyncio.to_thread(take), LIMIT_S)

    async def error(self) -> Exception:
        with pytest.raises(grpc.RpcError) as caught:
            await self.read()
        return error_of(caught.value, "prefill node")

    def close(self) -> None:
        self._words.put(None)
        self._call.cancel()
        self._channel.__exit__(None, None, None)


async def pulled(
    node: PrefillNode, token_ids: Sequence[int], name: str, **fields: Any
) -> tuple[dict[tuple[int, int], bytes], pb.TransferComplete]:
    """Payloads of a stream by (layer, first token), in the order in which they came, and its last message."""
    caller = Caller(node, token_ids, transfer_id=name, **fields)
    messages = await caller.read(2)
    while messages[-1].WhichOneof("event") != "complete":
        messages += await caller.read(1)
    caller.acknowledge(messages[-2].tile.layer + 1, 0)
    await caller.read()
    caller.close()
    tiles = {(each.tile.layer, each.tile.first_token): each.payload for each in messages[1:-1]}
    assert list(tiles) == sorted(tiles)
    return tiles, messages[-1].complete
