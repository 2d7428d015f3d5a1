"""Attacks on a gateway that runs: each is bounded, stays on the loopback, and says what came of it."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colm.wire.endpoint import HANDSHAKE_MS, open_channel
from colm.wire.members import Member
from colm.wire.outcome import Outcome
from colm.wire.prompt_stream import OPEN_TIMEOUT_S
from colm.wire.security import Security, Tls, new_tls
from colm.wire.tile_codec import pull_kv_stub
from colm.wire.v1 import common_pb2
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.children import python
from tests.listening import family, is_loopback, listeners

_CALL_S = 60.0
GENERATE = "/colm.wire.v1.GenerationService/Generate"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A gateway, and what its clients show."""

    address: str
    security: Security
    pid: int | None = None
    """Process whose descendants are the cluster; None where that is not known."""


Attack = Callable[[Target], Awaitable[str]]
"""Attacks and returns what came of it in a few words; an AssertionError if it is not what should."""


async def listening(target: Target) -> str:
    """Every port of the cluster is on the loopback, but for the gateway's."""
    if target.pid is None:
        return "not looked at: the cluster's processes are not known"
    found = await asyncio.to_thread(lambda: list(listeners(family(target.pid or 0))))
    port = int(target.address.rpartition(":")[2])
    exposed = [one for one in found if not is_loopback(one[1]) and one[2] != port]
    assert not exposed, f"exposed: {exposed}"
    return f"{len(found)} ports, all on the loopback but for the gateway's"


async def no_token(target: Target) -> str:
    """A call without a token, to each method."""
    return await _refused(replace(target.security, token=None), target, "UNAUTHENTICATED")


async def wrong_token(target: Target) -> str:
    """A call with a token that nobody was given."""
    return await _refused(replace(target.security, token="x" * 43), target, "UNAUTHENTICATED")


async def plaintext(target: Target) -> str:
    """A call without TLS, token and all."""
    return await _refused(replace(target.security, tls=None), target, "UNAVAILABLE")


async def wrong_authority(target: Target) -> str:
    """A client that trusts another authority, as one does that a stranger's server answers."""
    return await _refused(replace(target.security, tls=new_tls().for_clients()), target, "UNAVAILABLE")


async def nodes_without_certificate(target: Target) -> str:
    """A client that knows where the nodes are calls them with its token, and trusts their authority."""
    async with open_channel(target.address, target.security) as channel:
        status = await GenerationServiceStub(channel).GetClusterStatus(
            pb.GetClusterStatusRequest(), metadata=target.security.metadata(), timeout=_CALL_S
        )
    tls, codes = target.security.current_tls, Counter[str]()
    for node in status.nodes:
        member = Member.DECODE if node.role == pb.ROLE_DECODE else Member.PREFILL
        shown = replace(target.security, tls=tls and replace(tls, server_name=member.certificate_name))
        async with open_channel(node.address, shown) as channel:
            stub = DecodeServiceStub(channel).Decode if member is Member.DECODE else pull_kv_stub(channel)
            codes += await _codes([stub(each([]), metadata=shown.metadata(), timeout=_CALL_S)])
    assert set(codes) <= {"UNAVAILABLE" if tls else "UNAUTHENTICATED"}, codes
    return f"{len(status.nodes)} nodes asked: {_shown(codes)}"


async def garbage_bytes(target: Target) -> str:
    """Messages that are none."""
    async with open_channel(target.address, target.security) as channel:
        codes = await _codes(
            channel.stream_stream(GENERATE)(each([b"\xff" * 64]), metadata=target.security.metadata(), timeout=_CALL_S)
            for _ in range(64)
        )
    assert set(codes) == {"INVALID_ARGUMENT"}, codes
    return _shown(codes)


async def oversized(target: Target) -> str:
    """A message beyond the limit, a document that never ends, and metadata of a megabyte."""
    metadata = target.security.metadata()
    async with open_channel(target.address, target.security) as channel:
        huge = channel.stream_stream(GENERATE)(each([b"\n" * (9 << 20)]), metadata=metadata, timeout=_CALL_S)
        piece = pb.GenerateRequest(document=b"a" * (1 << 20)).SerializeToString()
        opened = pb.GenerateRequest(open=pb.OpenGenerate(prompt="x")).SerializeToString()
        endless = channel.stream_stream(GENERATE)(each([opened, *[piece] * 256]), metadata=metadata, timeout=_CALL_S)
        wide = channel.stream_stream(GENERATE)(
            each([opened]), metadata=(*metadata, ("x", "a" * (1 << 20))), timeout=_CALL_S
        )
        codes = await _codes([huge, endless, wide])
    assert set(codes) <= {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}, codes
    return _shown(codes)


async def reset_flood(target: Target) -> str:
    """Calls that are opened and taken back at once, thousands of them."""
    num_calls = 4000
    async with open_channel(target.address, target.security) as channel:
        for _ in range(num_calls // 100):
            calls = [
                channel.stream_stream(GENERATE)(metadata=target.security.metadata(), timeout=_CALL_S)
                for _ in range(100)
            ]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
    return f"{num_calls} calls opened and reset"


async def raw_flood(target: Target) -> str:
    """Ten megabytes that are neither TLS nor HTTP/2, over many connections."""

    def flood() -> int:
        num_sent = 0
        for _ in range(40):
            with socket.create_connection(_host_port(target), timeout=10) as connection:
                try:
                    for _ in range(4):
                        connection.sendall(os.urandom(1 << 16))
                        num_sent += 1 << 16
                except OSError:
                    continue
        return num_sent

    return f"{await asyncio.to_thread(flood) >> 10} KiB taken before connections were closed"


async def silent_connections(target: Target) -> str:
    """Connections that never say a word."""

    def wait() -> float:
        connections = [socket.create_connection(_host_port(target), timeout=10) for _ in range(100)]
        started_s = time.monotonic()
        for connection in connections:
            connection.settimeout(HANDSHAKE_MS / 1e3 + 30)
            while connection.recv(1 << 12):  # in plaintext the server speaks first
                pass
            connection.close()
        return time.monotonic() - started_s

    return f"100 closed by the server after {await asyncio.to_thread(wait):.0f} s"


async def silent_calls(target: Target) -> str:
    """Calls with the right token that never send their `open`."""
    async with open_channel(target.address, target.security) as channel:
        started_s = time.monotonic()
        codes = await _codes(
            channel.stream_stream(GENERATE)(_silence(), metadata=target.security.metadata(), timeout=_CALL_S)
            for _ in range(200)
        )
    assert set(codes) == {"DEADLINE_EXCEEDED"}, codes
    took_s = time.monotonic() - started_s
    assert took_s < _CALL_S - 1, "it was the caller's own deadline"
    return f"{_shown(codes)} after {took_s:.0f} s, {OPEN_TIMEOUT_S:g} are allowed"


async def watch_flood(target: Target) -> str:
    """Health watchers without a token."""
    async with open_channel(target.address, replace(target.security, token=None)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = [stub.Watch(health_pb2.HealthCheckRequest(service=str(number))) for number in range(300)]
        first = await asyncio.gather(*(call.read() for call in watching), return_exceptions=True)
        codes = Counter(
            "served" if isinstance(one, health_pb2.HealthCheckResponse) else one.code().name for one in first
        )
        for call in watching:
            call.cancel()
    assert codes["RESOURCE_EXHAUSTED"] > 0, codes
    return _shown(codes)


async def slow_readers(target: Target) -> str:
    """Answers that nobody reads, then taken back."""
    async with open_channel(target.address, target.security) as channel:
        stub = GenerationServiceStub(channel)
        calls = [
            stub.Generate(each(question(200)), metadata=target.security.metadata(), timeout=_CALL_S) for _ in range(8)
        ]
        await asyncio.sleep(5)
        for call in calls:
            call.cancel()
    return "8 answers of up to 200 tokens left unread for 5 s"


async def stopped_client(target: Target) -> str:
    """A client whose process is stopped in the middle of an answer, with its connection open."""
    words = [
        target.address,
        target.security.token or "",
        tls.ca_pem.decode() if (tls := target.security.current_tls) else "",
    ]
    child = await asyncio.to_thread(
        lambda: subprocess.Popen(python(_STOPPED_CLIENT, *words), stdout=subprocess.PIPE, text=True)
    )
    assert child.stdout is not None
    try:
        line = await asyncio.to_thread(child.stdout.readline)
        assert line.strip() == "reading", f"the client said {line!r}"
        os.kill(child.pid, signal.SIGSTOP)
        await asyncio.sleep(20)
    finally:
        child.kill()
        await asyncio.to_thread(child.wait)
        child.stdout.close()
    return "stopped for 20 s; what it held is looked at next"


_STOPPED_CLIENT = """
import asyncio, sys
from colm.wire.endpoint import open_channel
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.attack.attacks import each, question, target_of
async def main():
    target = target_of(sys.argv[1:4])
    async with open_channel(target.address, target.security) as channel:
        metadata = target.security.metadata()
        call = GenerationServiceStub(channel).Generate(each(question(2000)), metadata=metadata)
        await call.read()
        print("reading", flush=True)
        async for _ in call:
            pass
asyncio.run(main())
"""

ATTACKS: dict[str, Attack] = {
    "listeners": listening,
    "no token": no_token,
    "wrong token": wrong_token,
    "plaintext": plaintext,
    "wrong authority": wrong_authority,
    "nodes without a certificate": nodes_without_certificate,
    "garbage bytes": garbage_bytes,
    "oversized": oversized,
    "resets": reset_flood,
    "raw bytes": raw_flood,
    "silent connections": silent_connections,
    "silent calls": silent_calls,
    "health watchers": watch_flood,
    "slow readers": slow_readers,
    "stopped client": stopped_client,
}


def words_of(target: Target) -> list[str]:
    """Command-line words from which `target_of` makes the target again."""
    tls = target.security.current_tls
    return [target.address, target.security.token or "", tls.ca_pem.decode() if tls else ""]


def target_of(words: list[str]) -> Target:
    """The target of these words, without its process."""
    address, token, ca_pem = words
    tls = Tls(ca_pem=ca_pem.encode()) if ca_pem else None
    return Target(address=address, security=Security(token=token or None, tls=tls))


def question(max_new_tokens: int) -> list[pb.GenerateRequest]:
    """The messages of a short request, in token ids so that every model can read it."""
    sampling = common_pb2.Sampling(ignore_eos=True)
    return [
        pb.GenerateRequest(open=pb.OpenGenerate(max_new_tokens=max_new_tokens, num_chains=1, sampling=sampling)),
        pb.GenerateRequest(token_ids=common_pb2.TokenIds(ids=[5, 6, 7, 8])),
        pb.GenerateRequest(end_of_prompt=common_pb2.EndOfPrompt()),
    ]


async def _refused(shown: Security, target: Target, code: str) -> str:
    async with open_channel(target.address, shown) as channel:
        stub, metadata = GenerationServiceStub(channel), shown.metadata()
        codes = await _codes(
            [
                stub.GetClusterStatus(pb.GetClusterStatusRequest(), metadata=metadata, timeout=_CALL_S),
                stub.Generate(each(question(1)), metadata=metadata, timeout=_CALL_S),
            ]
        )
    assert set(codes) == {code}, codes
    return _shown(codes)


async def _codes(calls: Iterable[grpc.aio.Call]) -> "Counter[str]":
    async def code(call: grpc.aio.Call) -> str:
        try:
            with Outcome(call).statuses():
                if isinstance(call, grpc.aio.UnaryUnaryCall):
                    await call
                else:
                    async for _ in call:
                        pass
        except grpc.aio.AioRpcError as err:
            return str(err.code().name)
        return "OK"

    return Counter(await asyncio.gather(*map(code, calls)))


async def each(messages: list[object]) -> AsyncIterator[object]:
    for message in messages:
        yield message


async def _silence() -> AsyncIterator[object]:
    await asyncio.sleep(2 * _CALL_S)
    yield b""


def _host_port(target: Target) -> tuple[str, int]:
    host, _, port = target.address.rpartition(":")
    return host.strip("[]"), int(port)


def _shown(codes: "Counter[str]") -> str:
    return ", ".join(f"{count} {code}" for code, count in codes.most_common())
