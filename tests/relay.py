"""A relay of TCP connections: it counts them, can vanish for a while, and can spoil bytes on the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum

from colm.wire.endpoint import dial_address

_CHUNK_BYTES = 1 << 16


class Mishap(Enum):
    """What can happen to the bytes of one direction; what is not said to be lost comes as it was sent."""

    BREAK = "both ends see the connection reset"
    TRUNCATE = "both ends see an orderly end"
    STALL = "nothing more comes, and the connection stays open"
    DELAY = "the rest comes later"
    FLIP = "bits of some bytes change"
    LOSE = "some bytes do not come"
    REPEAT = "some bytes come twice"
    SWAP = "some bytes come after as many that follow them"


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteFault:
    """A mishap at a place of one direction of the next connection."""

    mishap: Mishap
    at_byte: int
    """Of the direction, from 0."""
    num_bytes: int = 1
    """That change, are lost, come twice, or change places with the next ones."""
    is_from_server: bool = True
    """Which direction."""
    delay_s: float = 0.1


class _Broken(Exception):
    """The connection shall be reset."""


class Relay:
    """Listens at an address of its own and relays connections to a server's.

    Set `fault` to spoil the next connection that is made; it is spoilt once.
    """

    def __init__(self, target: str) -> None:
        self.address = ""
        self.num_accepted = 0
        self.num_spoilt = 0
        """Connections on which the fault's place was reached."""
        self.fault: ByteFault | None = None
        self._host, _, self._port = target.rpartition(":")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def num_open(self) -> int:
        """Connections that are open from the caller through to the server."""
        return len(self._writers) // 2

    async def start(self) -> None:
        """Listen, at the same address as before."""
        port = int(self.address.rpartition(":")[2] or 0)
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", port)
        self.address = dial_address("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def vanish(self) -> None:
        """Break every connection off, and accept no other."""
        assert self._server is not None
        self._server.close()
        await self.break_off()

    async def break_off(self) -> None:
        """Reset every connection; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0.001)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        fault, self.fault = self.fault, None
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        up, down = (None, fault) if fault is not None and fault.is_from_server else (fault, None)
        both = writer, far_writer
        await asyncio.gather(self._forward(reader, far_writer, up, both), self._forward(far_reader, writer, down, both))

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        fault: ByteFault | None,
        both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        self._writers.add(writer)
        try:
            async for data in _whole(reader) if fault is None else self._spoilt(reader, fault):
                writer.write(data)
                await writer.drain()
        except _Broken:
            for each in both:
                each.transport.abort()
        except ConnectionError:
            pass
        finally:
            for each in both if fault is not None and fault.mishap is Mishap.TRUNCATE else (writer,):
                each.close()
            self._writers.discard(writer)

    async def _spoilt(self, reader: asyncio.StreamReader, fault: ByteFault) -> AsyncIterator[bytes]:
        left = fault.at_byte
        while left:
            if not (data := await reader.read(min(left, _CHUNK_BYTES))):
                return
            left -= len(data)
            yield data
        if not (data := await reader.read(fault.num_bytes)):
            return
        self.num_spoilt += 1
        match fault.mishap:
            case Mishap.BREAK:
                raise _Broken
            case Mishap.TRUNCATE:
                return
            case Mishap.STALL:
                while await reader.read(_CHUNK_BYTES):
                    pass
                return
            case Mishap.DELAY:
                await asyncio.sleep(fault.delay_s)
                yield data
            case Mishap.FLIP:
                yield bytes(byte ^ 1 << (fault.at_byte + i) % 8 for i, byte in enumerate(data))
            case Mishap.LOSE:
                pass
            case Mishap.REPEAT:
                yield data + data
            case Mishap.SWAP:
                yield await reader.read(len(data)) + data
        async for data in _whole(reader):
            yield data


async def _whole(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(_CHUNK_BYTES):
        yield data


@asynccontextmanager
async def relay(target: str) -> AsyncIterator[Relay]:
    """Run a relay in front of a server."""
    standing = Relay(target)
    await standing.start()
    try:
        yield standing
    finally:
        await standing.vanish()
