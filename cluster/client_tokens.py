"""The clients of a gateway besides its operator: a file with a name, a digest and limits for each token.

The gateway looks at the file whenever a call comes, and each second while a client's call lasts. So a token is valid
from the next call on, and soon after it is revoked its calls have ended.
"""

import asyncio
import fcntl
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from cluster.state import write_private
from colm.errors import ClusterError, Unauthenticated
from colm.settings import explain
from colm.wire.security import new_token

logger = logging.getLogger(__name__)

TOKENS_FILE = "client_tokens.json"
OPERATOR = "operator"
"""Name of whoever shows the cluster's own token, which `colm up` made."""
_MAX_FILE_BYTES = 16 << 20
_LOOK_S = 1.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenLimits(_Strict):
    """What the requests of one client may take; None for as much as the gateway gives."""

    max_requests: PositiveInt | None = None
    """Requests at once."""
    max_queued_tokens: PositiveInt | None = None
    """Prompt tokens of its requests at once, those that wait and those that are answered."""
    max_bytes: PositiveInt | None = None
    """Bytes of its requests' documents and token ids at once."""
    max_tokens_per_minute: PositiveInt | None = None
    """Prompt tokens and new tokens of the last 60 seconds."""
    max_files_bytes: PositiveInt | None = None
    """Bytes of its files that are kept."""


class Client(_Strict):
    """Who a token stands for."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")
    """Of the token, which is 256 random bits: nobody finds it by its digest."""
    limits: TokenLimits = TokenLimits()

    @property
    def is_operator(self) -> bool:
        """Whether it may see where the nodes are."""
        return self.name == OPERATOR


class _File(_Strict):
    clients: tuple[Client, ...] = ()


class Clients:
    """Everybody that a gateway admits.

    Args:
        operator_token: the cluster's own token; None admits every caller, as the operator.
        path: the file of the others, which need not exist; None without one.
    """

    def __init__(self, operator_token: str | None, path: Path | None = None) -> None:
        self._operator = Client(name=OPERATOR, sha256=digest(operator_token) if operator_token else "")
        self._is_open = operator_token is None
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._by_digest: dict[str, Client] = {}
        self.num_refused = 0
        """Calls with no token or a wrong one, so far."""

    def of(self, token: str) -> Client | None:
        """Who shows this token; None if nobody does. The time that it takes says nothing of a token but its digest."""
        if self._is_open:
            return self._operator
        self._look()
        shown = digest(token)
        found = self._operator if shown == self._operator.sha256 else self._by_digest.get(shown)
        self.num_refused += found is None
        return found

    def require(self, token: str) -> Client:
        """Who shows this token.

        Raises:
            Unauthenticated: it is empty, or nobody's.
        """
        if (found := self.of(token)) is None:
            raise Unauthenticated("the token is wrong" if token else "a token is needed (`Authorization: Bearer`)")
        return found

    def names(self) -> set[str]:
        """Of everybody who is admitted now."""
        self._look()
        return {OPERATOR, *(client.name for client in self._by_digest.values())}

    @asynccontextmanager
    async def while_admitted(self, client: Client) -> AsyncIterator[None]:
        """Run a block as long as the client's token is valid.

        Raises:
            Unauthenticated: it is no longer, and the block has been cancelled.
        """
        if client.is_operator:
            yield
            return

        async def look() -> None:
            while client.sha256 in self._by_digest:
                await asyncio.sleep(_LOOK_S)
                self._look()
            lasts.reschedule(asyncio.get_running_loop().time())

        try:
            async with asyncio.timeout(None) as lasts:
                looking = asyncio.create_task(look())
                try:
                    yield
                finally:
                    looking.cancel()
        except TimeoutError as err:
            if not lasts.expired():
                raise
            logger.info("tokens.call_ended client=%s", client.name)
            raise Unauthenticated("the token has been revoked") from err

    def _look(self) -> None:
        """Read the file if it has changed. One that is damaged changes nothing, and is a line in the log."""
        if self._path is None:
            return
        try:
            found = self._path.stat()
            seen: tuple[int, ...] | None = (found.st_mtime_ns, found.st_ino, found.st_size)
        except OSError:
            seen = None
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._by_digest = {client.sha256: client for client in read_clients(self._path) if client.sha256}
        except ClusterError as err:
            logger.error("tokens.unreadable error=%s", err)
        else:
            logger.info("tokens.read clients=%d", len(self._by_digest))


def digest(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read_clients(path: Path) -> tuple[Client, ...]:
    """The clients of a file; none where there is no file.

    Raises:
        ClusterError: it is damaged, or others may read or write it.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        return ()
    except OSError as err:
        raise ClusterError(f"cannot read {path}: {err.strerror}") from err
    if mode & 0o077:
        raise ClusterError(f"others may read {path} (mode {mode & 0o777:o}); chmod it to 600")
    try:
        return _File.model_validate_json(text).clients
    except ValidationError as err:
        raise ClusterError(f"{path} is damaged: {explain(err, str)}; correct it or remove it") from err


def create_token(path: Path, name: str, limits: TokenLimits) -> str:
    """Add a client, and return its token, which is kept nowhere.

    Raises:
        ClusterError: the name is taken or cannot be one, or the file is damaged.
    """
    token = new_token()
    try:
        client = Client(name=name, sha256=digest(token), limits=limits)
    except ValidationError as err:
        raise ClusterError(
            f"{name!r:.80} cannot be a client's name; use up to 64 letters, digits, dots, dashes and underscores"
        ) from err
    with _changing(path) as clients:
        if name in (OPERATOR, *(other.name for other in clients)):
            raise ClusterError(f"there is a client {name!r} already; choose another name, or revoke that one first")
        clients.append(client)
    return token


def revoke_token(path: Path, name: str) -> None:
    """Remove a client: its token is refused from the next call on, and its running calls end about a second later.

    Raises:
        ClusterError: there is no such client, or the file is damaged.
    """
    with _changing(path) as clients:
        kept = [client for client in clients if client.name != name]
        if len(kept) == len(clients):
            raise ClusterError(f"there is no client {name!r:.80}; `colm token list` shows them")
        clients[:] = kept


@contextmanager
def _changing(path: Path) -> Iterator[list[Client]]:
    """The clients of a file, written back as the block leaves them; one command at a time."""
    try:
        lock = path.with_name(f"{path.name}.lock").open("w")
    except OSError as err:
        raise ClusterError(f"cannot write {path}: {err.strerror}; the folder must be there") from err
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clients = list(read_clients(path))
        yield clients
        write_private(path, _File(clients=tuple(clients)).model_dump_json(indent=2) + "\n")
