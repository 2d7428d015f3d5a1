"""What TLS costs between nodes, without and with a certificate of the caller: `python -m bench.certificates --json`.

Both ends are in this process, so a time has the work of both. Contenders run in turn.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import grpc

from bench.harness.channels import bare_channel
from bench.harness.contest import Case, Contest, Run
from bench.harness.suite import Options, arguments, run
from colm.clock import utc_now
from colm.wire.authority import Authority
from colm.wire.endpoint import bind, create_server
from colm.wire.members import Member
from colm.wire.security import Security, new_tls

_SERVICE = "bench.Certificates"
_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """What either end of a connection shows and demands."""

    server: Security
    client: Security


def sides() -> dict[str, Sides]:
    """Plaintext; the server's certificate alone; both."""
    authority = Authority.new(utc_now())
    callee, caller = (new_tls(member, authority) for member in (Member.PREFILL, Member.DECODE))
    return {
        "plaintext": Sides(server=Security(), client=Security()),
        "tls": Sides(server=Security(tls=replace(callee, caller_name=None)), client=Security(tls=caller.for_clients())),
        "mutual": Sides(server=Security(tls=callee), client=Security(tls=caller)),
    }


@dataclass(frozen=True, kw_only=True)
class ConnectionsCase(Case):
    """New connections, one after the other, with one empty call on each."""

    num_connections: int

    @property
    def name(self) -> str:
        """Their number."""
        return f"connections_{self.num_connections}"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:  # noqa: ARG002 - nothing is random
        """The three kinds of connections."""
        yield _contest(lambda each: partial(_turn, _connect, each, self.num_connections), compared_by="s")


@dataclass(frozen=True, kw_only=True)
class BytesCase(Case):
    """Messages of 1 MiB from the server, over one connection that is there already."""

    num_mib: int

    @property
    def name(self) -> str:
        """Their bytes."""
        return f"bytes_{self.num_mib}MiB"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:  # noqa: ARG002 - nothing is random
        """The three kinds of connections."""
        yield _contest(lambda each: partial(_turn, _read, each, self.num_mib), compared_by="gb_per_s")


def _contest(run_of: Callable[[Sides], Run], *, compared_by: str) -> Contest:
    return Contest(
        check=lambda: None,  # a call that is refused raises
        contenders={name: run_of(each) for name, each in sides().items()},
        ours="mutual",
        against=("tls", "plaintext"),
        compared_by=compared_by,
    )


def _turn(
    work: Callable[[str, Security, int], Awaitable[dict[str, float]]], each: Sides, amount: int
) -> dict[str, float]:
    async def turn() -> dict[str, float]:
        async with _serving(each.server) as address:
            return await work(address, each.client, amount)

    return asyncio.run(turn())


async def _connect(address: str, security: Security, num_connections: int) -> dict[str, float]:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(num_connections):
        async with bare_channel(address, security) as channel:
            await channel.unary_unary(f"/{_SERVICE}/Call")(b"", timeout=60.0)
    cpu_s = (time.process_time() - start_cpu_s) / num_connections
    return {"s": (time.perf_counter() - start_s) / num_connections, "cpu_s": cpu_s}


async def _read(address: str, security: Security, num_mib: int) -> dict[str, float]:
    async with bare_channel(address, security) as channel:
        await channel.unary_unary(f"/{_SERVICE}/Call")(b"", timeout=60.0)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        call = channel.unary_stream(f"/{_SERVICE}/Stream")(num_mib.to_bytes(4), timeout=600.0)
        num_bytes = sum([len(message) async for message in call])
        cpu_s = time.process_time() - start_cpu_s
        seconds = time.perf_counter() - start_s
    assert num_bytes == num_mib * _MESSAGE_BYTES
    return {"gb_per_s": num_bytes / seconds / 1e9, "cpu_s": cpu_s}


@asynccontextmanager
async def _serving(security: Security) -> AsyncIterator[str]:
    async def answer(_: bytes, __: grpc.aio.ServicerContext) -> bytes:
        return b""

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> None:
        message = bytes(_MESSAGE_BYTES)
        for _ in range(int.from_bytes(request)):
            await context.write(message)

    handlers = {
        "Call": grpc.unary_unary_rpc_method_handler(answer),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    server = create_server(security)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = bind(server, "127.0.0.1", 0, security)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def main() -> None:
    """Run both cases."""
    options = arguments("bench.certificates", __doc__, rounds=9).parse_args(namespace=Options())
    run([ConnectionsCase(num_connections=50), BytesCase(num_mib=256)], options)


if __name__ == "__main__":
    main()
