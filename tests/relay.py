"""A relay of TCP connections that counts them, and can vanish for a while."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from colm.wire.endpoint import dial_address


class Relay:
    """Listens at an address of its own and relays connections to a server's."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.num_accepted = 0
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
        for writer in self._writers:
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0.001)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        await asyncio.gather(self._forward(reader, far_writer), self._forward(far_reader, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
            self._writers.discard(writer)


@asynccontextmanager
async def relay(target: str) -> AsyncIterator[Relay]:
    """Run a relay in front of a server."""
    standing = Relay(target)
    await standing.start()
    try:
        yield standing
    finally:
        await standing.vanish()
