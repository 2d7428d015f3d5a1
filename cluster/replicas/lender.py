"""Replicas of a Serve deployment, lent in order of asking."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from colm.errors import CapacityExceeded, PeerUnavailable
from colm.line import BEAT_INTERVAL_S, Beat, Line, wait_at_most
from colm.nodes import Role

logger = logging.getLogger(__name__)

LEASE_TTL_S = 30.0
"""How long a replica keeps a lease for a stream that does not come."""
_TERM_S = 4.0
"""A call that is older brings no further lease: Serve kills a replica 8 s after it began to stop it."""
_BEATS_PER_GRANT = 5
MAX_PASSED_OVER = 8
"""How often Serve may name a replica that is not looked for, before the search ends."""
_WANTED_S = 0.2
"""How long Serve may take to name a further replica while one is in hand, though not the one that is wanted."""


class _Call:
    """An open `lease` call: leases of one replica, one after the other."""

    def __init__(self, grants: Any, tell: Callable[[], None]) -> None:
        self._grants = grants
        self._tell = tell
        self.is_in_term = True
        """It may bring further leases."""
        self.want_lease()

    def want_lease(self) -> None:
        """Ask for the first lease, or for the next one; `granted` is what comes of it, and `tell` says when."""
        self.granted: asyncio.Future[tuple[str, str]] = asyncio.ensure_future(anext(self._grants))
        self.granted.add_done_callback(self._answered)

    @property
    def address(self) -> str:
        """Of the replica whose lease is in hand."""
        return self.granted.result()[0]

    @property
    def has_lease(self) -> bool:
        """A lease is in hand."""
        return self.granted.done() and not self.granted.cancelled() and self.granted.exception() is None

    def end(self) -> None:
        """Give the replica back."""
        self.granted.cancel()
        self._grants.cancel()

    def _answered(self, granted: asyncio.Future[tuple[str, str]]) -> None:
        if not granted.cancelled():
            granted.exception()  # or asyncio complains of an error that nobody was left to see
            self._tell()


class ServeLender:
    """Replicas of one Serve deployment, lent in the order of asking. Lives on one event loop; `close` it.

    Serve chooses the replica, among those that take one more call, and waits for one where all are busy or gone. Only
    the first in line asks it: so everybody has a place that can be told, and nobody is bound to a busy replica while
    another one becomes free.

    Asking takes milliseconds. A lender that is alone keeps the call to a replica that its last user has left, and has
    the next lease in hand before anybody asks (ADR 18).

    Args:
        handle: of the deployment.
        role: of its replicas, for messages.
        max_waiting: who comes when so many wait is refused.
        is_alone: nobody else borrows from this deployment, so nobody misses a replica that is kept unused.
    """

    def __init__(self, handle: Any, role: Role, *, max_waiting: int, is_alone: bool) -> None:
        self._handle = handle.options(stream=True)
        self._role = role
        self._line = Line(f"a {role.value} node", max_waiting=max_waiting)
        self._is_alone = is_alone
        self._somebody_asks = False
        self._news = asyncio.Event()
        """Set whenever a call was answered."""
        self._num_used = Counter[str]()
        """Calls in use, by the addresses of their replicas."""
        self._kept: dict[_Call, str] = {}
        """Calls that nobody uses, with the addresses of their replicas."""

    def set_alone(self, is_alone: bool) -> None:
        """Somebody else borrows from now on, or nobody; one that is not alone any more gives back what it keeps."""
        self._is_alone = is_alone
        if not is_alone:
            self.close()

    @property
    def num_waiting(self) -> int:
        """Who waits in line."""
        return len(self._line)

    def close(self) -> None:
        """Give back what nobody uses."""
        for call in list(self._kept):
            self._let_go(call)

    @asynccontextmanager
    async def lease(
        self, beat: Beat, *, refused_by: Collection[str] = (), wanted: str | None = None
    ) -> AsyncIterator[tuple[str, str]]:
        """Hold a replica's `lease` call open; yields (address, lease id).

        Args:
            beat: told of the wait.
            refused_by: addresses of replicas that had no room; another one is lent at once, or none.
            wanted: address of the replica that is lent if Serve soon names it, else that which it names first.

        Raises:
            PeerUnavailable: the replica died before it answered.
            CapacityExceeded: too many wait already, or no other replica is free.
        """
        if refused_by and len(self._line):
            raise self._no_other()
        await self._line.turn(self._take_the_word, beat)
        try:
            if refused_by:
                call = self._take_kept(refused_by) or await self._ask_for_another(beat, refused_by)
            else:
                call = self._take_kept(wanted=wanted) or await self._ask_for(beat, wanted)
        finally:
            self._somebody_asks = False
            self._line.look_again()
        address, lease_id = call.granted.result()
        self._num_used[address] += 1
        has_ended_well = False
        try:
            yield address, lease_id
            has_ended_well = True
        finally:
            self._num_used[address] -= 1
            if not self._num_used[address]:
                del self._num_used[address]
            if has_ended_well and self._may_keep(call, address):
                self._kept[call] = address
                call.want_lease()
            else:
                call.end()

    def _take_the_word(self) -> bool | None:
        if self._somebody_asks:
            return None
        self._somebody_asks = True
        return True

    async def _ask_for_another(self, beat: Beat, refused_by: Collection[str]) -> _Call:
        passed_over: list[_Call] = []
        try:
            while len(passed_over) < MAX_PASSED_OVER:
                call = await self._ask(beat, patience_s=BEAT_INTERVAL_S)
                if call.address not in refused_by:
                    return call
                # Held meanwhile: Serve weighs replicas by their calls, and would name the same one again.
                passed_over.append(call)
            raise self._no_other()
        finally:
            for call in passed_over:
                call.end()

    async def _ask_for(self, beat: Beat, wanted: str | None) -> _Call:
        named = [self._take_kept() or await self._ask(beat)]
        chosen: _Call | None = None
        try:
            while wanted not in (None, named[-1].address) and len(named) < MAX_PASSED_OVER:
                named.append(await self._ask(beat, patience_s=_WANTED_S))
            chosen = named[-1] if named[-1].address == wanted else named[0]
        except (CapacityExceeded, PeerUnavailable):
            chosen = named[0]
        finally:
            for call in named:
                if call is not chosen:
                    call.end()
        return chosen

    async def _ask(self, beat: Beat, *, patience_s: float | None = None) -> _Call:
        """A call with a lease in hand.

        Args:
            beat: told of the wait.
            patience_s: for so long, and for none that others leave; then CapacityExceeded. None is as long as it takes.
        """
        while True:
            call, taken = _Call(self._handle.lease.remote(self._is_alone), self._news.set), None
            try:
                for _ in range(_BEATS_PER_GRANT):
                    self._news.clear()
                    await wait_at_most(self._news, BEAT_INTERVAL_S if patience_s is None else patience_s)
                    if call.granted.done():
                        call.granted.result()
                        if self._is_alone:  # nobody else keeps a call
                            asyncio.get_running_loop().call_later(_TERM_S, self._end_term, call)
                        taken = call
                    elif patience_s is not None:
                        raise self._no_other()
                    else:
                        taken = self._take_kept()
                    if taken is not None:
                        return taken
                    await beat(0)
            except (RayError, RayServeException) as err:
                raise PeerUnavailable(f"no {self._role.value} node answered: {err}") from err
            finally:
                if taken is not call:
                    call.end()
            # Serve may have handed the call to a replica that was stopped a moment ago and will never answer.
            logger.info("lease.asked_again role=%s", self._role.value)

    def _may_keep(self, call: _Call, address: str) -> bool:
        # With others in use there it is Serve that weighs the replicas, and a call that is kept would weigh too.
        if not self._is_alone or not call.is_in_term:
            return False
        return address not in self._num_used and address not in self._kept.values()

    def _no_other(self) -> CapacityExceeded:
        return CapacityExceeded(f"no other {self._role.value} node is free; try again later")

    def _take_kept(self, refused_by: Collection[str] = (), wanted: str | None = None) -> _Call | None:
        for call, address in self._kept.items():
            if call.has_lease and address not in refused_by and wanted in (None, address):
                del self._kept[call]
                return call
        return None

    def _end_term(self, call: _Call) -> None:
        call.is_in_term = False
        self._let_go(call)

    def _let_go(self, call: _Call) -> None:
        if self._kept.pop(call, None) is not None:
            call.end()
