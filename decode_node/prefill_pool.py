"""Where a decode node gets a prefill node from."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from colm import defaults
from colm.clock import Clock
from colm.errors import CapacityExceeded, PeerFailed, PeerUnavailable
from colm.line import Beat, Line

_FIRST_REST_S = 1.0
_LAST_REST_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillLease:
    """A prefill node's promise to take one stream."""

    address: str
    lease_id: str


class PrefillPool(Protocol):
    """Lends prefill nodes. The cluster's pool asks Ray Serve; the static one knows addresses."""

    def loads(self) -> Mapping[str, int]:
        """Streams of ours on each node, by address: those that are known, but for nodes that failed lately."""

    def lease(
        self, *, num_tokens: int, beat: Beat, preferred: str | None, refused_by: Collection[str]
    ) -> AbstractAsyncContextManager[PrefillLease]:
        """Borrow a node for a prompt of that length, in order of asking; leaving the context gives it back.

        Args:
            num_tokens: of the prompt.
            beat: told of the wait.
            preferred: address of a node that has begun with this prompt, or one that begins alike; lent if it has room.
            refused_by: addresses of nodes that had no room for this prompt; none of them is lent. With some, the prompt
                waits for nobody.

        Raises:
            PeerUnavailable: none can be had just now; worth trying again.
            CapacityExceeded: too many wait already, or no other node is free.
        """


def no_other() -> CapacityExceeded:
    """No node is free but those that refused."""
    return CapacityExceeded("no other prefill node is free; try again later")


@dataclass(slots=True)
class _Node:
    address: str
    num_streams: int = 0
    num_tokens: int = 0
    """Of the prompts on those streams."""
    num_failures: int = 0
    """In a row."""
    rests_until_s: float = 0.0
    """After a failure: the node is asked only if no other has room."""


class StaticPrefillPool:
    """Prefill nodes at fixed addresses, each lent for so many of our streams at a time.

    The node that has the fewest tokens of ours is lent first. Prompts take turns there, so a short one is never held up
    by a long one; a prompt that finds all nodes full waits here, where the next one that has room can take it.

    Args:
        addresses: host:port of each.
        clock: measures how long a node that failed rests.
        max_streams: prompts of ours on a node at once.
        max_waiting: prompts that may wait; the next is refused.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        clock: Clock,
        *,
        max_streams: int = defaults.MAX_STREAMS,
        max_waiting: int = 1024,
    ) -> None:
        if not addresses:
            raise ValueError("a decode node needs the address of at least one prefill node")
        self._nodes = [_Node(address) for address in dict.fromkeys(addresses)]
        self._clock = clock
        self._max_streams = max_streams
        self._line = Line("a prefill node", max_waiting=max_waiting)

    def loads(self) -> Mapping[str, int]:
        """Of all nodes that do not rest."""
        now_s = self._clock.now()
        return {node.address: node.num_streams for node in self._nodes if node.rests_until_s <= now_s}

    @asynccontextmanager
    async def lease(
        self,
        *,
        num_tokens: int,
        beat: Beat,
        preferred: str | None,
        refused_by: Collection[str],
    ) -> AsyncIterator[PrefillLease]:
        """Borrow a node with room; the preferred one first, one that failed lately only where no other has room.

        One that failed lately is not another that is free for whom some have refused.
        """
        if not refused_by:
            node = await self._line.turn(lambda: self._take(num_tokens, preferred, self._nodes), beat)
        else:
            now_s = self._clock.now()
            others = [n for n in self._nodes if n.address not in refused_by and n.rests_until_s <= now_s]
            if len(self._line) or (found := self._take(num_tokens, preferred, others)) is None:
                raise no_other()
            node = found
        try:
            yield PrefillLease(address=node.address, lease_id="")
            node.num_failures, node.rests_until_s = 0, 0.0
        except (PeerUnavailable, PeerFailed):
            rest_s = min(_FIRST_REST_S * 2**node.num_failures, _LAST_REST_S)
            node.num_failures += 1
            node.rests_until_s = self._clock.now() + rest_s
            raise
        finally:
            node.num_streams -= 1
            node.num_tokens -= num_tokens
            # The least recently used is first among equals.
            self._nodes.append(self._nodes.pop(self._nodes.index(node)))
            self._line.look_again()

    def _take(self, num_tokens: int, preferred: str | None, nodes: Sequence[_Node]) -> _Node | None:
        now_s = self._clock.now()

        def worth(node: _Node) -> tuple[bool, float, int]:
            return node.address != preferred, max(0.0, node.rests_until_s - now_s), node.num_tokens

        with_room = (node for node in nodes if node.num_streams < self._max_streams)
        if (node := min(with_room, key=worth, default=None)) is not None:
            node.num_streams += 1
            node.num_tokens += num_tokens
        return node
