"""Ray Serve, as far as a lender sees it: the handle of a deployment that brings each call to one of two replicas.

Modelled, not imported. Serve's router draws two replicas at random and takes the one with fewer calls ("power of two
choices"); where both are full it looks on. A replica that becomes free is given to the call that has waited longest.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Any


class ServeModel:
    """A deployment's handle: `lease` calls stay open until they are cancelled, as those of the real replicas.

    Args:
        max_ongoing: calls that a replica takes at once.
        lease_s: what asking takes.
        rng: draws the two.
    """

    def __init__(self, *, max_ongoing: int, lease_s: float, rng: Random) -> None:
        self._max_ongoing = max_ongoing
        self._lease_s = lease_s
        self._rng = rng
        self._addresses: list[str] = []
        self._num_ongoing: dict[str, int] = {}
        self._waiting: deque[_Lease] = deque()

    @property
    def lease(self) -> "ServeModel":
        """The method of the replicas."""
        return self

    def options(self, **_: Any) -> "ServeModel":
        """As Serve's handle."""
        return self

    def add(self, address: str) -> None:
        """A replica takes calls from now on."""
        self._addresses.append(address)
        self._num_ongoing.setdefault(address, 0)
        self._hand_out()

    def retire(self, address: str) -> None:
        """A replica takes no more calls; those that it has go on."""
        self._addresses.remove(address)

    def remote(self, again: bool) -> "_Lease":  # noqa: ARG002 - a lender that is not alone asks no call for more
        """Call some replica."""
        call = _Lease(self)
        asyncio.get_running_loop().call_later(self._lease_s, self._arrived, call)
        return call

    def end(self, call: "_Lease") -> None:
        """A call was cancelled."""
        if call.address is not None:
            self._num_ongoing[call.address] -= 1
            self._hand_out()
        elif call in self._waiting:
            self._waiting.remove(call)

    def _arrived(self, call: "_Lease") -> None:
        if not call.has_ended:
            self._waiting.append(call)
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and (address := self._choose()) is not None:
            call = self._waiting.popleft()
            self._num_ongoing[address] += 1
            call.get(address)

    def _choose(self) -> str | None:
        drawn = self._rng.sample(self._addresses, min(2, len(self._addresses)))
        for candidates in (drawn, self._addresses):  # the second is what looking on comes to
            if address := min(self._with_room(candidates), key=self._num_ongoing.__getitem__, default=None):
                return address
        return None

    def _with_room(self, addresses: list[str]) -> Iterator[str]:
        return (each for each in addresses if self._num_ongoing[each] < self._max_ongoing)


class _Lease:
    """One call: an iterator of (address, lease id), as `LeaseTable.offer` yields them; the next one is always there."""

    def __init__(self, serve: ServeModel) -> None:
        self._serve = serve
        self.has_ended = False
        self.address: str | None = None
        self._granted: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()

    async def __anext__(self) -> tuple[str, str]:
        return await self._granted

    def get(self, address: str) -> None:
        """A replica has taken it."""
        self.address = address
        if not self._granted.done():
            self._granted.set_result((address, ""))

    def cancel(self) -> None:
        """Give the replica back; twice is once."""
        if not self.has_ended:
            self.has_ended = True
            self._serve.end(self)
