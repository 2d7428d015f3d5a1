"""A decode node that stops reading, although its connection lives, does not keep a prefill node from the others."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from colm.errors import PeerUnavailable
from colm.kv import KvFormat
from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.tile_codec import pull_kv_stub
from prefill_node import prefill_job
from prefill_node.engine import PrefillEngine
from prefill_node.job_bytes import job_bytes
from tests.gates import LIMIT_S
from tests.nodes import TILE_TOKENS, decode, decode_node, prefill_node, pull_kv_requests
from tests.tiny import tiny_checkpoint, tiny_config

CONFIG = tiny_config(max_context=8192, num_layers=16)
PROMPT = torch.randint(0, 320, (1600,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("window_bytes", [5 << 20, 64 << 20], ids=["full window", "computed to its end"])
async def test_a_reader_that_never_reads_makes_way(
    tmp_path: Path, window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: its job held the memory that the first in line waited for, for ever."""
    monkeypatch.setattr(prefill_job, "WINDOW_BYTES", window_bytes)
    checkpoint = tiny_checkpoint(tmp_path / "tiny", CONFIG)
    engine = PrefillEngine(checkpoint, KvFormat.of(CONFIG, torch.float32), tile_tokens=TILE_TOKENS)
    path, memory_bytes = str(checkpoint.path), job_bytes(engine, len(PROMPT))
    async with (
        prefill_node(path, memory_bytes=memory_bytes, stall_s=0.5) as prefill,
        decode_node(path, [prefill.address], kv_cache_bytes=64 << 20) as node,
        open_channel(prefill.address, Security()) as channel,
    ):
        may_close = asyncio.Event()

        async def requests() -> AsyncIterator[object]:
            for request in pull_kv_requests(prefill, PROMPT, transfer_id="silent"):
                yield request
            await may_close.wait()

        call = pull_kv_stub(channel)(requests())
        async with asyncio.timeout(LIMIT_S):
            while not prefill.service.load.num_active:
                await asyncio.sleep(0.01)
        assert len((await decode(node.address, PROMPT)).token_ids) == 8
        assert prefill.service.load.num_active == 0
        with pytest.raises(PeerUnavailable, match=r"prefill\.stall_s=0\.5"), Outcome(call).errors("prefill node"):
            async for _ in call:
                pass
        may_close.set()
