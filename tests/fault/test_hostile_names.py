"""Whoever reaches a server may name any method: it is refused, and the server goes on."""

import asyncio

import pytest

from colm.wire.endpoint import open_channel
from colm.wire.security import Security, new_token
from tests.doors import ask_status, ask_stream, ask_tiles, serving
from tests.gates import LIMIT_S

SECURITY = Security(token=new_token())
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, DATA = 4, 1, 0
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field of HTTP/2 that is in no table."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call_of(path: bytes) -> bytes:
    """All that a caller sends for a call, in plaintext."""
    fields = [(b":path", path), (b":authority", b"a"), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
    block = b"\x83\x86" + b"".join(literal(*each) for each in fields)  # POST, http
    return (
        PREFACE
        + frame(SETTINGS, 0, 0, b"")
        + frame(HEADERS, END_HEADERS, 1, block)
        + frame(DATA, END_STREAM, 1, bytes(5))
    )


@pytest.mark.parametrize("path", [b"/x\xe5y/z", b"/colm.wire.v1.Decod\xe5Service/Decode", b"/nobody/nothing", b"/"])
async def test_a_call_of_any_name_is_refused_and_the_server_goes_on(path: bytes) -> None:
    """Bug: a name that is not UTF-8 ended the server and its running calls, for a caller without a token."""
    async with serving(SECURITY) as address, open_channel(address, SECURITY) as channel:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(call_of(path))
        refusal = b""
        async with asyncio.timeout(LIMIT_S):
            while b"Method not found!" not in refusal:
                data = await reader.read(1 << 16)
                assert data, refusal
                refusal += data
        writer.close()
        for ask in (ask_status, ask_stream, ask_tiles):
            assert await ask(channel, SECURITY) == 1
