"""Every client's requests, whatever their protocol: each is opened, counted, limited and ended here, once."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

from cluster.accounts import Accounts, Usage
from cluster.client_tokens import Client, Clients
from cluster.front_door.front_door import FrontDoor
from cluster.front_door.prompt import PromptPart
from cluster.metrics import RequestMetrics, SeenRequest
from colm.events import Event
from colm.request import GenerateRequest
from colm.scale import ScaleWish


class OpenRequest:
    """A request that is inside. It asks the front door once, as its client, and what it is told is counted."""

    def __init__(
        self, front_door: FrontDoor, metrics: RequestMetrics, client: Client, seen: SeenRequest, usage: Usage
    ) -> None:
        self._front_door = front_door
        self._metrics = metrics
        self._client = client
        self._seen = seen
        self._usage = usage

    @asynccontextmanager
    async def generate(
        self,
        request: GenerateRequest,
        prompt: AsyncIterator[PromptPart],
        *,
        changes: AsyncIterator[ScaleWish] | None = None,
        caller_waits_s: float | None = None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """As `FrontDoor.generate`."""
        if request.answer_token_ids:
            self._metrics.continued.inc()
        self._seen.asks(self._front_door.model_of(request.model).name)
        answer = self._front_door.generate(
            request,
            self._usage.counted(prompt),
            changes=changes,
            owner=self._client.name,
            caller_waits_s=caller_waits_s,
        )
        async with answer as events, aclosing(self._counted(events)) as counted:
            yield counted

    @asynccontextmanager
    async def resume(
        self,
        answer_key: str,
        num_tokens: int,
        *,
        changes: AsyncIterator[ScaleWish] | None = None,
        caller_waits_s: float | None = None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """As `FrontDoor.resume`."""
        self._seen.is_resumed = self._usage.is_resumed = True
        answer = self._front_door.resume(
            answer_key, num_tokens, changes=changes, owner=self._client.name, caller_waits_s=caller_waits_s
        )
        async with answer as events, aclosing(self._counted(events)) as counted:
            yield counted

    async def _counted(self, events: AsyncIterator[Event]) -> AsyncGenerator[Event]:
        async for event in events:
            self._usage.see(event)
            self._seen.see(event)
            yield event


class ClientRequests:
    """Lets the requests of clients in. Lives on one event loop.

    Args:
        front_door: serves them.
        clients: who is admitted, and whose tokens are still valid.
        accounts: what each client may take; writes down how its requests ended.
        metrics: counts them.
    """

    def __init__(self, front_door: FrontDoor, clients: Clients, accounts: Accounts, metrics: RequestMetrics) -> None:
        self.front_door = front_door
        self.clients = clients
        self._accounts = accounts
        self._metrics = metrics

    @asynccontextmanager
    async def open(self, client: Client) -> AsyncIterator[OpenRequest]:
        """Count a request as inside as long as the block lasts; how the block ends is how the request ended.

        Raises:
            CapacityExceeded: the client has as many requests as it may have.
            Unauthenticated: its token has been revoked meanwhile, and the block has been cancelled.
        """
        with self._metrics.request(client.name) as seen, self._accounts.open(client) as usage:
            async with self.clients.while_admitted(client):
                yield OpenRequest(self.front_door, self._metrics, client, seen, usage)

    @contextmanager
    def reading(self, client: Client) -> Iterator[None]:
        """Read what a client asks before its requests are opened; what cannot be read is a request that ended so."""
        try:
            yield
        except Exception:
            with self._metrics.request(client.name), self._accounts.open(client):
                raise
