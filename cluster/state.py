"""What `colm up` leaves for `colm submit`, `status` and `down`: where the cluster is and how to be let in."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colm.errors import ClusterError
from colm.wire.security import Security, Tls

_FILE = "cluster.json"
_JOINED_FILE = "joined"
_LOCK_FILE = "lock"


def write_private(path: Path, text: str) -> None:
    """Write a whole file that only this user can read; it appears complete or not at all."""
    partial = path.with_name(f"{path.name}.new")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)  # a leftover keeps its own mode when it is opened
        file.write(text)
    partial.replace(path)


@contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """Keep every other `colm up` and `colm down` off a directory; the system lets go when this process ends, however.

    Raises:
        ClusterError: another is at work.
    """
    with (state_dir / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ClusterError(f"another `colm up` or `colm down` is at work on {state_dir}; let it end first") from err
        yield


def note_joined(state_dir: Path, ray_address: str) -> None:
    """From here on there may be something of ours on a Ray that is not."""
    write_private(state_dir / _JOINED_FILE, ray_address)


def read_joined(state_dir: Path) -> str | None:
    """Address of the Ray where there may be something of ours; None if there is none."""
    path = state_dir / _JOINED_FILE
    return path.read_text() if path.exists() else None


def default_state_dir() -> Path:
    """Where state is kept unless `--state-dir` or COLM_STATE_DIR says otherwise."""
    return Path.home() / ".local" / "state" / "colm-serve"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterState:
    """A running cluster."""

    gateway_address: str
    ray_address: str
    ray_pid: int | None
    """Process of the Ray that `colm up` started; None where it joined one."""
    client_token: str | None = field(repr=False)
    ca_pem: str | None
    """Authority of the gateway's certificate; None is plaintext."""

    @property
    def security(self) -> Security:
        """What a client needs to be let in."""
        tls = None if self.ca_pem is None else Tls(ca_pem=self.ca_pem.encode())
        return Security(token=self.client_token, tls=tls)

    def write(self, state_dir: Path) -> None:
        """Keep it where only this user can read it."""
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        body = json.dumps({name: getattr(self, name) for name in self.__slots__}, indent=2)
        write_private(state_dir / _FILE, body + "\n")

    @classmethod
    def read(cls, state_dir: Path) -> "ClusterState | None":
        """The cluster that is up, as far as this directory knows.

        Raises:
            ClusterError: the file is damaged.
        """
        path = state_dir / _FILE
        try:
            body: dict[str, Any] = json.loads(path.read_text())
            return cls(**body)
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as err:
            raise ClusterError(f"{path} is damaged ({err}); remove it and run `colm up` again") from err

    @classmethod
    def require(cls, state_dir: Path) -> "ClusterState":
        """As `read`, for commands that need a cluster."""
        state = cls.read(state_dir)
        if state is None:
            raise ClusterError(f"no cluster is known in {state_dir}; run `colm up --model DIR` first")
        return state

    @staticmethod
    def forget(state_dir: Path) -> None:
        """The cluster is down."""
        for name in (_FILE, _JOINED_FILE):
            (state_dir / name).unlink(missing_ok=True)
