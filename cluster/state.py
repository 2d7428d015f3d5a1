"""The state file that `colm up` writes for `submit`, `status` and `down`: the cluster's addresses and secrets."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from colm.errors import ClusterError, StateVersionMismatch
from colm.wire.certificates import dialled_name, pem_of, read_certificates
from colm.wire.security import Security, Tls

_FILE = "cluster.json"
VERSION = 1
"""Of the state file. Another set of fields, or another meaning of one, is another version; files before 1 had none."""
_JOINED_FILE = "joined"
_LOCK_FILE = "lock"
SECRETS = "secrets"
"""Folder of the secrets that `colm up` makes for a Ray of its own."""


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read; it appears complete or not at all."""
    partial = path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)  # a leftover, or a link to where others read
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def make_state_dir(state_dir: Path) -> None:
    """Make the directory, or see that the one that is there is this user's.

    Raises:
        ClusterError: others may write into it, and so plant links in place of logs and secrets.
    """
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = state_dir.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ClusterError(f"others may write into {state_dir}; make it yours and chmod it to 700, or name another one")


@contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """Hold the lock of a directory, which keeps every other `colm up` and `colm down` off it.

    The system releases the lock when this process ends, even if it is killed.

    Raises:
        ClusterError: another command holds the lock.
    """
    with (state_dir / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ClusterError(f"another `colm up` or `colm down` is at work on {state_dir}; let it end first") from err
        yield


class Joined(NamedTuple):
    """A joined Ray cluster, on which replicas of ours may run."""

    ray_address: str
    application: str
    """`ray.application`, by which they are told from those of other clusters."""


def note_joined(state_dir: Path, joined: Joined) -> None:
    """Record a joined Ray cluster, on which a replica of ours may run from now on."""
    write_private(state_dir / _JOINED_FILE, "\n".join(joined))


def read_joined(state_dir: Path) -> Joined | None:
    """The joined Ray cluster on which replicas of ours may run; None without one."""
    path = state_dir / _JOINED_FILE
    return Joined(*path.read_text().split("\n")) if path.exists() else None


def default_state_dir() -> Path:
    """Where state is kept unless `--state-dir` or COLM_STATE_DIR says otherwise."""
    return Path.home() / ".local" / "state" / "colm-serve"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterState:
    """Where a running cluster is, and what its clients must show."""

    gateway_address: str
    http_address: str = ""
    """Where the gateway speaks HTTP, as OpenAI's clients do."""
    ray_address: str
    ray_pid: int | None
    """Process of the Ray that `colm up` started; None where it joined one."""
    client_token: str | None = field(repr=False)
    ca_file: str | None
    """The authorities that clients trust, which may change meanwhile; None without TLS."""
    own_certificate: str | None = None
    """File of the certificate that the gateway shows in place of one of that authority."""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """What it was brought up with, by section."""
    application: str = "colm"
    """Name of its Serve application."""
    weights_stamps: dict[str, str] = field(default_factory=dict)
    """Of all models' weights as their replicas read them, by file."""

    @property
    def cluster(self) -> str:
        """Its name among those that share a joined Ray."""
        return str(self.options.get("ray", {}).get("application", "colm"))

    @property
    def drain_s(self) -> float:
        """How long answers have to end when it stops."""
        return float(self.options.get("gateway", {}).get("drain_s", 0.0))

    @property
    def security(self) -> Security:
        """Token and TLS of a client on this machine, as the files say now.

        Raises:
            ConfigError: the authorities, or the gateway's own certificate, cannot be read.
        """
        tls = None if self.ca_file is None else Tls(ca_pem=pem_of(read_certificates(Path(self.ca_file))))
        if self.own_certificate is not None:
            # This very certificate, which may be renewed meanwhile: whoever else has one for its name is not trusted.
            leaf = read_certificates(Path(self.own_certificate))[0]
            tls = Tls(ca_pem=pem_of([leaf]), server_name=dialled_name(leaf))
        return Security(token=self.client_token, tls=tls)

    @property
    def base_url(self) -> str:
        """What OpenAI's clients are told; with an own certificate, its name, which must lead to the gateway.

        Raises:
            ConfigError: the gateway's own certificate cannot be read.
        """
        if self.own_certificate is None:
            return f"{'http' if self.ca_file is None else 'https'}://{self.http_address}/v1"
        name = dialled_name(read_certificates(Path(self.own_certificate))[0])
        return f"https://{name}:{self.http_address.rpartition(':')[2]}/v1"

    def write(self, state_dir: Path) -> None:
        """Write the state file, which only this user can read."""
        make_state_dir(state_dir)
        fields = {name: getattr(self, name) for name in self.__slots__}
        body = json.dumps({"version": VERSION} | fields, indent=2)
        write_private(state_dir / _FILE, body + "\n")

    @classmethod
    def read(cls, state_dir: Path) -> "ClusterState | None":
        """Read the state file; None if there is none.

        Raises:
            StateVersionMismatch: another version of colm-serve wrote it.
            ClusterError: the file is damaged.
        """
        path = state_dir / _FILE
        try:
            body = json.loads(path.read_text())
            if not isinstance(body, dict):
                raise TypeError("it is no JSON object")
            if (version := body.pop("version", 0)) != VERSION:
                raise StateVersionMismatch(
                    f"{path} was written by another version of colm-serve (state version {version!r}, this one's is "
                    f"{VERSION}); run `colm down` with that one, or remove the file and run `colm down` with this one, "
                    "which ends the cluster without letting its answers end"
                )
            return cls(**body)
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as err:
            raise ClusterError(f"{path} is damaged ({err}); remove it and run `colm up` again") from err

    @classmethod
    def require(cls, state_dir: Path) -> "ClusterState":
        """Read the state file of a cluster that must be up.

        Raises:
            ClusterError: there is no state file, or it is damaged.
        """
        state = cls.read(state_dir)
        if state is None:
            raise ClusterError(f"no cluster is known in {state_dir}; run `colm up --model DIR` first")
        return state

    @staticmethod
    def forget(state_dir: Path) -> None:
        """Delete the state files and the cluster's own secrets."""
        for name in (_FILE, _JOINED_FILE):
            (state_dir / name).unlink(missing_ok=True)
        shutil.rmtree(state_dir / SECRETS, ignore_errors=True)
