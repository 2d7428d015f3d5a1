"""Where a decode node gets a prefill node from."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from colm.clock import Clock
from colm.errors import PeerFailed, PeerUnavailable
from colm.line import Beat, Line

_FIRST_REST_S = 1.0
_LAST_REST_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillLease:
    """One prefill node, ours for one stream."""

    address: str
    lease_id: str


class PrefillPool(Protocol):
    """Lends prefill nodes. The cluster's pool asks Ray Serve; the static one knows addresses."""

    def lease(self, *, num_tokens: int, beat: Beat, preferred: str | None) -> AbstractAsyncContextManager[PrefillLease]:
        """Borrow a node for a prompt of that length, in order of asking; leaving the context gives it back.

        Args:
            num_tokens: of the prompt.
            beat: told of the wait.
            preferred: address of a node that has begun with this prompt; to be lent where the pool can choose.

        Raises:
            PeerUnavailable: none can be had just now; worth trying again.
            CapacityExceeded: too many wait already.
        """


@dataclass(slots=True)
class _Node:
    address: str
    is_lent: bool = False
    num_failures: int = 0
    """In a row."""
    rests_until_s: float = 0.0
    """After a failure: the node is asked only if no other is free."""


class StaticPrefillPool:
    """Prefill nodes at fixed addresses, each lent for one of our streams at a time.

    A prompt is never sent to a node that computes another one of ours: it waits here, where the next node that becomes
    free can take it.

    Args:
        addresses: host:port of each.
        clock: measures how long a node that failed rests.
        max_waiting: prompts that may wait; the next is refused.
    """

    def __init__(self, addresses: Sequence[str], clock: Clock, *, max_waiting: int = 1024) -> None:
        if not addresses:
            raise ValueError("a decode node needs the address of at least one prefill node")
        self._nodes = [_Node(address) for address in dict.fromkeys(addresses)]
        self._clock = clock
        self._line = Line("a prefill node", max_waiting=max_waiting)

    @asynccontextmanager
    async def lease(
        self,
        *,
        num_tokens: int,  # noqa: ARG002 - the pool's contract
        beat: Beat,
        preferred: str | None,
    ) -> AsyncIterator[PrefillLease]:
        """Borrow a free node; the preferred one first, one that failed lately only where no other is free."""
        node = await self._line.turn(lambda: self._take(preferred), beat)
        try:
            yield PrefillLease(address=node.address, lease_id="")
            node.num_failures, node.rests_until_s = 0, 0.0
        except (PeerUnavailable, PeerFailed):
            rest_s = min(_FIRST_REST_S * 2**node.num_failures, _LAST_REST_S)
            node.num_failures += 1
            node.rests_until_s = self._clock.now() + rest_s
            raise
        finally:
            node.is_lent = False
            # The least recently used is first among equals.
            self._nodes.append(self._nodes.pop(self._nodes.index(node)))
            self._line.look_again()

    def _take(self, preferred: str | None) -> _Node | None:
        free = [node for node in self._nodes if not node.is_lent]
        if not free:
            return None
        now_s = self._clock.now()
        node = min(free, key=lambda node: (node.address != preferred, max(0.0, node.rests_until_s - now_s)))
        node.is_lent = True
        return node
