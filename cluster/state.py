"""What `colm up` leaves for `colm submit`, `status` and `down`: where the cluster is and how to be let in."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colm.errors import ClusterError
from colm.wire.security import Security, Tls

_FILE = "cluster.json"


def write_private(path: Path, text: str) -> None:
    """Write a whole file that only this user can read; it appears complete or not at all."""
    partial = path.with_name(f"{path.name}.new")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)  # a leftover keeps its own mode when it is opened
        file.write(text)
    partial.replace(path)


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
        (state_dir / _FILE).unlink(missing_ok=True)
