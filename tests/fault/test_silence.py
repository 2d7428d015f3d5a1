"""Calls that are silent for long, and peers that never answer again."""

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest

from colm.checkpoint import Checkpoint
from colm.errors import PeerUnavailable
from colm.wire import endpoint
from colm.wire.endpoint import Keepalive, bind, create_server, open_channel
from colm.wire.outcome import Outcome
from colm.wire.security import Security
from colm.wire.tile_codec import pull_kv_stub
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import (
    DecodeServiceServicer,
    DecodeServiceStub,
    add_DecodeServiceServicer_to_server,
)
from tests import children
from tests.gates import LIMIT_S
from tests.nodes import TILE_TOKENS, decode_node, decode_requests
from tests.tiny import tiny_checkpoint, tiny_config

ROOT = Path(__file__).parents[2]
# A twentieth of the real times: 6 s of silence bring twelve pings, as 120 s do.
SCALED = Keepalive(interval_ms=500, timeout_ms=5_000)
SILENCE_S = 6.0

# A process of its own: other traffic on the same connection would hide the pings.
CALLER = """
import sys
from colm.wire import endpoint
from colm.wire.security import Security
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub

endpoint.KEEPALIVE = endpoint.Keepalive(interval_ms=int(sys.argv[2]))
with endpoint.open_blocking_channel(sys.argv[1], Security()) as channel:
    (answer,) = DecodeServiceStub(channel).Decode(iter([pb.DecodeRequest()]), timeout=200)
    print(answer.reserved.num_pages)
"""


class Silent(DecodeServiceServicer):
    """Thinks before it answers."""

    async def Decode(
        self,
        request_iterator: AsyncIterator[pb.DecodeRequest],  # noqa: ARG002
        context: grpc.aio.ServicerContext,
    ) -> None:
        await asyncio.sleep(SILENCE_S)
        await context.write(pb.DecodeResponse(reserved=pb.Reserved(num_pages=7)))


async def test_a_call_outlives_any_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the server took keepalive pings for abuse and closed the connection at the fourth: "too many pings"."""
    monkeypatch.setattr(endpoint, "KEEPALIVE", SCALED)
    server = create_server(Security())
    add_DecodeServiceServicer_to_server(Silent(), server)
    port = bind(server, "127.0.0.1", 0, Security())
    await server.start()
    try:
        caller = await asyncio.create_subprocess_exec(
            *children.python(CALLER, f"127.0.0.1:{port}", str(SCALED.interval_ms)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        stdout, stderr = await caller.communicate()
    finally:
        await server.stop(None)
    assert stdout.decode().strip() == "7", stderr.decode()


# A node by hand, whose keepalive is scaled as this process's is.
PREFILL_NODE = """
import sys
import typer
from colm.wire import endpoint
from prefill_node.__main__ import main

endpoint.KEEPALIVE = endpoint.Keepalive(interval_ms=int(sys.argv.pop(1)))
typer.run(main)
"""


# A test that stops a child as the tests below do, and is killed before it goes on.
KILLED_TEST = """
import os, signal, subprocess, sys
from tests import children

child = subprocess.Popen(children.python(sys.argv[1]), stdout=subprocess.PIPE)
child.stdout.readline()
child.send_signal(signal.SIGSTOP)
os.waitpid(child.pid, os.WUNTRACED)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
CHILD = "import time; print('up', flush=True); time.sleep(600)"


def test_a_stopped_child_ends_with_a_test_that_is_killed() -> None:
    """Bug: a stopped node was left behind for ever."""
    parent = subprocess.run(
        children.python(KILLED_TEST, CHILD), cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert parent.returncode == -signal.SIGKILL
    give_up_s = time.monotonic() + LIMIT_S
    with suppress(psutil.NoSuchProcess):
        # Nobody may be there to bury it.
        while psutil.Process(int(parent.stdout)).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < give_up_s
            time.sleep(0.02)


@asynccontextmanager
async def prefill_process(checkpoint: Checkpoint) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    words = ("--model", str(checkpoint.path), "--dtype", "float32")
    process = await asyncio.create_subprocess_exec(
        *children.python(PREFILL_NODE, str(SCALED.interval_ms), *words, "--tile-tokens", str(TILE_TOKENS)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().strip()
        assert address
        yield address, process
    finally:
        process.kill()
        await process.wait()


async def test_a_stopped_prefill_node_is_replaced_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a stopped process keeps its connections open, so it was waited for until the request's deadline."""
    monkeypatch.setattr(endpoint, "KEEPALIVE", SCALED)
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(num_layers=16, max_context=8192))
    prompt = [number % 320 for number in range(3000)]
    async with (
        prefill_process(checkpoint) as (address, process),
        prefill_process(checkpoint) as (other, _),
        decode_node(str(checkpoint.path), [address, other], kv_cache_bytes=64 << 20) as node,
        open_channel(node.address, Security()) as channel,
    ):
        call = DecodeServiceStub(channel).Decode(iter(decode_requests(prompt)), timeout=45)
        is_stopped = False
        responses = []
        async for response in call:
            responses.append(response)
            if response.WhichOneof("event") == "prefill_progress" and not is_stopped:
                process.send_signal(signal.SIGSTOP)
                is_stopped = True
    assert is_stopped
    assert responses[-1].finished.usage.num_kv_streams == 2


async def test_a_stopped_peer_is_noticed_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is sent either way, only a ping shows that the peer is stopped."""
    monkeypatch.setattr(endpoint, "KEEPALIVE", SCALED)
    may_speak = asyncio.Event()

    async def nothing() -> AsyncIterator[object]:
        await may_speak.wait()
        yield None

    async with (
        prefill_process(tiny_checkpoint(tmp_path / "tiny")) as (address, process),
        open_channel(address, Security()) as channel,
    ):
        await channel.channel_ready()
        call = pull_kv_stub(channel)(nothing(), timeout=45)
        await call.wait_for_connection()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerUnavailable), Outcome(call).errors("prefill node"):
            await call.read()
        may_speak.set()
