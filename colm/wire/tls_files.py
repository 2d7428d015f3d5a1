"""Certificates that are read again whenever their files have changed: nothing restarts when one is renewed."""

import datetime
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from colm.clock import utc_now
from colm.errors import ConfigError
from colm.wire.certificates import pem_of, read_certificates, read_pair
from colm.wire.members import Member
from colm.wire.security import Tls

logger = logging.getLogger(__name__)

CA_FILE = "ca.pem"
"""The authorities that members trust: one, or two while one takes the other's place."""
REVOKED_FILE = "revoked"
"""Serial numbers in hex, one a line; may be missing."""


class TlsFiles:
    """A `TlsSource` over files. Thread-safe: gRPC asks at every handshake, from threads of its own.

    Files that cannot be used leave what was read before in place, with a line in the log.

    Args:
        certificate: a PEM file of the certificate and those that lead to its authority.
        key: of its key; may be the same file.
        ca: of the authorities that are trusted; None where nobody's certificate is looked at.
        revoked: of serial numbers; see `read_revoked`. None where nobody's certificate is looked at.
        server_name: see `Tls`.
        caller_name: see `Tls`.
        now: the time, with its zone.

    Raises:
        ConfigError: a file cannot be used now; see `read_pair`.
    """

    def __init__(
        self,
        *,
        certificate: Path,
        key: Path,
        ca: Path | None,
        revoked: Path | None = None,
        server_name: str | None = None,
        caller_name: str | None = None,
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> None:
        self._certificate, self._key, self._ca, self._revoked = certificate, key, ca, revoked
        self._server_name, self._caller_name = server_name, caller_name
        self._now = now
        self._lock = threading.Lock()
        self._seen = self._look()
        self._tls = self._read()

    def current(self) -> Tls:
        """What the files hold now, or held when they could last be used; the same object while nothing changes."""
        with self._lock:
            if (seen := self._look()) != self._seen:
                self._seen = seen
                try:
                    self._tls = self._read()
                except ConfigError as err:
                    logger.error("tls.unusable error=%s", err)
                else:
                    logger.info("tls.reread certificate=%s", self._certificate)
            return self._tls

    def _look(self) -> list[tuple[int, ...] | None]:
        paths = self._certificate, self._key, self._ca, self._revoked
        return [None if path is None else _stamp(path) for path in paths]

    def _read(self) -> Tls:
        pair = read_pair(self._certificate, self._key, self._now())
        trusted = b"" if self._ca is None else pem_of(read_certificates(self._ca))
        return Tls(
            ca_pem=trusted,
            cert_pem=pair.chain_pem,
            key_pem=pair.key_pem,
            server_name=self._server_name,
            caller_name=self._caller_name,
            revoked=frozenset() if self._revoked is None else read_revoked(self._revoked),
        )


def certificate_path(folder: Path, member: Member) -> Path:
    """The file of a member's key and certificate."""
    return folder / f"{member.value}.pem"


def read_revoked(path: Path) -> frozenset[int]:
    """The serial numbers in a file of them; none if there is no file.

    Raises:
        ConfigError: it cannot be read, or a line is no number in hex.
    """
    try:
        return frozenset(int(line, 16) for line in path.read_text().split())
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as err:
        raise ConfigError(f"{path} must hold a serial number in hex on each line: {err}") from err


def of_member(folder: Path, member: Member) -> TlsFiles:
    """The certificates of a member of a cluster, from a folder of `colm secrets`.

    Raises:
        ConfigError: a file is missing, or cannot be used.
    """
    path = certificate_path(folder, member)
    return TlsFiles(
        certificate=path,
        key=path,
        ca=folder / CA_FILE,
        revoked=folder / REVOKED_FILE,
        server_name=None if member.callee is None else member.callee.certificate_name,
        caller_name=None if member.caller is None else member.caller.certificate_name,
    )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
