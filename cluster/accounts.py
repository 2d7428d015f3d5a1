"""What each client's requests take, held against its limits, and written down as they end.

Gateways that overlap count together: one that gives way tells its successor what it still uses (ADR 63).
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.audit_log import AuditLog
from cluster.client_tokens import Client
from cluster.front_door.prompt import PromptPart
from colm.clock import Clock
from colm.errors import CapacityExceeded, InvalidRequest
from colm.events import Accepted, Event, Finished, Token

logger = logging.getLogger(__name__)

_MINUTE_S = 60.0


TOLD_S = 5.0
"""How long what another gateway said of its running requests is believed; it says so anew each second."""
MAX_TELLERS = 8
"""Gateways that are believed at once; each has given way to the next one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What one client uses at a gateway."""

    num_requests: int = 0
    num_bytes: int = 0
    num_prompt_tokens: int = 0
    spent: tuple[tuple[float, int], ...] = ()
    """(seconds ago, tokens) of the last minute, oldest first."""


class _Minute:
    """Tokens of the last minute."""

    def __init__(self, spent: Iterable[tuple[float, int]] = ()) -> None:
        self.spent = deque(spent)
        """(when, tokens), oldest first."""
        self.num_spent = sum(num_tokens for _, num_tokens in self.spent)

    def spend(self, num_tokens: int, now_s: float) -> None:
        # Tokens come one by one: those of a second are one entry.
        if self.spent and now_s - self.spent[-1][0] < 1.0:
            self.spent[-1] = (self.spent[-1][0], self.spent[-1][1] + num_tokens)
        else:
            self.spent.append((now_s, num_tokens))
        self.num_spent += num_tokens

    def forget(self, now_s: float) -> None:
        while self.spent and now_s - self.spent[0][0] >= _MINUTE_S:
            self.num_spent -= self.spent.popleft()[1]


class _Told:
    """What another gateway said of a client."""

    def __init__(self, use: Use, now_s: float) -> None:
        self.running = use
        self.minute = _Minute((now_s - ago_s, num_tokens) for ago_s, num_tokens in use.spent)
        self._until_s = now_s + TOLD_S

    def forget(self, now_s: float) -> None:
        self.minute.forget(now_s)
        if now_s >= self._until_s:  # that gateway is lost, and its requests with it
            self.running = Use()

    @property
    def is_over(self) -> bool:
        return not self.minute.spent and not self.running.num_requests


class _Account:
    def __init__(self) -> None:
        self.num_requests = self.num_bytes = self.num_prompt_tokens = 0
        self.minute = _Minute()
        self.told: dict[str, _Told] = {}
        """What other gateways said of it, by their names."""

    def forget(self, now_s: float) -> None:
        self.minute.forget(now_s)
        for name, told in list(self.told.items()):
            told.forget(now_s)
            if told.is_over:
                del self.told[name]

    @property
    def is_over(self) -> bool:
        return not self.num_requests and not self.minute.spent and not self.told

    def everywhere(self, name: str) -> int:
        """Its own count of that name, and those of the other gateways."""
        counted: list[int] = [getattr(each, name) for each in (self, *(told.running for told in self.told.values()))]
        return sum(counted)

    @property
    def num_spent(self) -> int:
        """Tokens of the last minute, everywhere."""
        return self.minute.num_spent + sum(told.minute.num_spent for told in self.told.values())

    def room_in_s(self, num_tokens: int, now_s: float) -> float:
        """Until so many of the minute's tokens are forgotten; there are as many."""
        for when_s, num_spent in sorted([*self.minute.spent, *(e for t in self.told.values() for e in t.minute.spent)]):
            num_tokens -= num_spent
            if num_tokens <= 0:
                return when_s + _MINUTE_S - now_s
        raise AssertionError("a minute has more tokens than its entries")

    def use(self, now_s: float) -> Use:
        spent = tuple((now_s - when_s, num_tokens) for when_s, num_tokens in self.minute.spent)
        return Use(
            num_requests=self.num_requests,
            num_bytes=self.num_bytes,
            num_prompt_tokens=self.num_prompt_tokens,
            spent=spent,
        )


class Usage:
    """What one request takes of its client's account."""

    def __init__(self, client: Client, account: _Account, clock: Clock) -> None:
        self._client = client
        self._account = account
        self._clock = clock
        self.num_bytes = 0
        self.num_prompt_tokens = 0
        self.num_new_tokens = 0
        self.request_id = ""
        self.is_finished = False
        self.is_resumed = False
        """It goes on with an answer that was admitted and counted before: nothing refuses it."""

    async def counted(self, prompt: AsyncIterator[PromptPart]) -> AsyncIterator[PromptPart]:
        """The prompt's parts, as long as their bytes are within the client's limit.

        Raises:
            CapacityExceeded: they are not, with those of its other requests.
        """
        limit = self._client.limits.max_bytes
        async for part in prompt:
            num_bytes = len(part) if isinstance(part, bytes) else part.nbytes
            self.num_bytes += num_bytes
            self._account.num_bytes += num_bytes
            self._account.forget(self._clock.now())
            if limit is not None and self._account.everywhere("num_bytes") > limit:
                if self.num_bytes > limit:
                    raise InvalidRequest("document", f"over {limit} bytes", f"this client may send {limit} bytes")
                raise self._full("max_bytes", "bytes", limit)
            yield part

    def see(self, event: Event) -> None:
        """Count what an event tells of.

        Raises:
            CapacityExceeded: the prompt is too long beside the client's other requests, or for this minute.
            InvalidRequest: it is too long for this client at any time.
        """
        now_s = self._clock.now()
        match event:
            case Accepted():
                self.request_id = event.request_id
                self._accept(event.num_prompt_tokens, now_s)
            case Token():
                self.num_new_tokens += 1
                self._account.minute.spend(1, now_s)
            case Finished():
                self.is_finished = True

    def _accept(self, num_tokens: int, now_s: float) -> None:
        limits, account = self._client.limits, self._account
        account.forget(now_s)
        if self.is_resumed:
            self.num_prompt_tokens = num_tokens
            account.num_prompt_tokens += num_tokens
            return
        for name, what, used in (
            ("max_queued_tokens", "prompt tokens", account.everywhere("num_prompt_tokens")),
            ("max_tokens_per_minute", "tokens a minute", account.num_spent),
        ):
            limit: int | None = getattr(limits, name)
            if limit is not None and num_tokens > limit:
                raise InvalidRequest("document", f"{num_tokens} prompt tokens", f"this client may use {limit} {what}")
            if limit is not None and used + num_tokens > limit:
                is_of_minute = name == "max_tokens_per_minute"
                in_s = account.room_in_s(used + num_tokens - limit, now_s) if is_of_minute else None
                raise self._full(name, what, limit, in_s)
        self.num_prompt_tokens = num_tokens
        account.num_prompt_tokens += num_tokens
        account.minute.spend(num_tokens, now_s)

    def _full(self, name: str, what: str, limit: int, in_s: float | None = None) -> CapacityExceeded:
        when, known = ("later", {}) if in_s is None else (f"in {math.ceil(in_s)} s", {"retry_after_s": in_s})
        return CapacityExceeded(
            f"client {self._client.name!r} may use {limit} {what}, and its requests use them now; try again {when}",
            client_limit=name,
            **known,
        )


class Accounts:
    """The accounts of all clients. Lives on one event loop.

    Args:
        clock: measures the minute.
        audit_log: gets a line for each request that has ended; None for none.
    """

    def __init__(self, clock: Clock, audit_log: AuditLog | None = None) -> None:
        self._clock = clock
        self._audit_log = audit_log
        self._accounts: dict[str, _Account] = {}

    def use(self) -> dict[str, Use]:
        """What every client uses here, for the gateway that takes this one's place."""
        self._forget(now_s := self._clock.now())
        used = {name: account.use(now_s) for name, account in self._accounts.items()}
        return {name: use for name, use in used.items() if use != Use()}

    def hear(self, teller: str, uses: Mapping[str, Use]) -> None:
        """Count what clients use at another gateway as well, in place of what it said before.

        Args:
            teller: its name, which no other gateway has.
            uses: by client.
        """
        self._forget(now_s := self._clock.now())
        tellers = {name for account in self._accounts.values() for name in account.told}
        if teller not in tellers and len(tellers) >= MAX_TELLERS:
            logger.warning("accounts.not_heard teller=%s", teller)
            return
        for account in self._accounts.values():
            account.told.pop(teller, None)
        for name, use in uses.items():
            self._accounts.setdefault(name, _Account()).told[teller] = _Told(use, now_s)
        self._forget(now_s)

    def _forget(self, now_s: float) -> None:
        for name, account in list(self._accounts.items()):
            account.forget(now_s)
            if account.is_over:
                del self._accounts[name]

    @contextmanager
    def open(self, client: Client) -> Iterator[Usage]:
        """Count a request of a client as long as the block lasts, and write down how it ended.

        Raises:
            CapacityExceeded: the client has as many requests as it may have.
        """
        account = self._accounts.setdefault(client.name, _Account())
        usage, started_s, outcome = Usage(client, account, self._clock), self._clock.now(), "lost"
        account.forget(started_s)
        account.num_requests += 1
        try:
            if (limit := client.limits.max_requests) is not None and account.everywhere("num_requests") > limit:
                raise CapacityExceeded(
                    f"client {client.name!r} may have {limit} requests at once; try again when one has ended",
                    client_limit="max_requests",
                )
            yield usage
            outcome = "finished" if usage.is_finished else "lost"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        except Exception as err:
            outcome = type(err).__name__
            raise
        finally:
            account.num_requests -= 1
            account.num_bytes -= usage.num_bytes
            account.num_prompt_tokens -= usage.num_prompt_tokens
            account.forget(self._clock.now())
            if account.is_over:
                self._accounts.pop(client.name, None)
            if self._audit_log is not None:
                self._audit_log.write(
                    client=client.name,
                    request_id=usage.request_id,
                    outcome=outcome,
                    document_bytes=usage.num_bytes,
                    prompt_tokens=usage.num_prompt_tokens,
                    new_tokens=usage.num_new_tokens,
                    duration_s=round(self._clock.now() - started_s, 3),
                )
