"""Bodies of requests as they arrive: bounded each, and all together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from colm.errors import CapacityExceeded, DeadlineExceeded, InvalidRequest

OVERHEAD_BYTES = 1 << 20
"""Of a body beside the document in it."""


class Bodies:
    """Reads bodies. Lives on one event loop.

    Args:
        max_bytes: of one.
        max_held_bytes: of all that are being read or answered.
        idle_s: longest pause between two pieces.
    """

    def __init__(self, *, max_bytes: int, max_held_bytes: int, idle_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._idle_s = idle_s
        self.num_held_bytes = 0

    @contextmanager
    def counted(self, request: Request) -> Iterator[Request]:
        """The request, whose body is counted as it is read, and held against the limits until the block ends.

        Reading raises InvalidRequest where it is too large, CapacityExceeded where all together are, and
        DeadlineExceeded where it pauses for too long.
        """
        num_bytes = 0

        async def receive() -> Any:
            nonlocal num_bytes
            try:
                async with asyncio.timeout(self._idle_s):
                    message = await request.receive()
            except TimeoutError as err:
                raise DeadlineExceeded(f"the body paused for more than upload_idle_s={self._idle_s:g}") from err
            num_more = len(message.get("body", b""))
            if num_bytes + num_more > self._max_bytes:
                raise InvalidRequest("body", f"over {self._max_bytes} bytes", f"at most {self._max_bytes} bytes")
            if self.num_held_bytes + num_more > self._max_held_bytes:
                raise CapacityExceeded(
                    f"requests that are being read hold {self.num_held_bytes} bytes, and have "
                    f"gateway.max_upload_bytes={self._max_held_bytes}; try again later"
                )
            num_bytes += num_more
            self.num_held_bytes += num_more
            return message

        try:
            yield Request(request.scope, receive)
        finally:
            self.num_held_bytes -= num_bytes
