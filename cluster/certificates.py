"""The certificates of a cluster's members: which there are, until when, and fresh ones in their place."""

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cluster.secret_files import CA_KEY_FILE, SecretFiles, issue
from colm.clock import utc_now
from colm.errors import ClusterError, ConfigError
from colm.wire.authority import Authority
from colm.wire.certificates import read_certificates
from colm.wire.members import Member
from colm.wire.tls_files import CA_FILE, certificate_path

logger = logging.getLogger(__name__)

_DUE_AT = 2 / 3
"""Share of its life after which a certificate is renewed."""
_NOTICE = timedelta(days=21)
"""How long before its end a certificate is spoken of that the cluster cannot renew."""
_LOOK_INTERVAL_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Validity:
    """From when until when a certificate is valid."""

    name: str
    """Whose it is: a member's word, or another."""
    path: Path
    begin: datetime
    end: datetime

    def is_due(self, now: datetime) -> bool:
        """Whether it is to be renewed."""
        return now >= self.begin + (self.end - self.begin) * _DUE_AT


def members_validity(folder: Path) -> list[Validity]:
    """The members' certificates in a folder, expired ones too.

    Raises:
        ConfigError: one of them cannot be read.
    """
    paths = {member.value: certificate_path(folder, member) for member in Member}
    return [_validity(name, path) for name, path in paths.items() if path.exists()]


def authority_validity(folder: Path) -> Validity:
    """The authority's certificate in a folder.

    Raises:
        ConfigError: it has none, or cannot be read.
    """
    return _validity("authority", folder / CA_FILE)


def own_validity(certificate: Path) -> Validity:
    """The certificate that the gateway's operator has from elsewhere.

    Raises:
        ConfigError: it has none, or cannot be read.
    """
    return _validity("own", certificate)


def _validity(name: str, path: Path) -> Validity:
    leaf = read_certificates(path)[0]
    return Validity(name=name, path=path, begin=leaf.not_valid_before_utc, end=leaf.not_valid_after_utc)


def renew(folder: Path, authority: Path, now: datetime, *, only_due: bool) -> list[Validity]:
    """Give the members of a folder fresh keys and certificates. Nodes that run use them from the next connection on.

    Args:
        folder: of the certificates.
        authority: folder with the authority and its key: the same one, or the first machine's.
        now: the time.
        only_due: those alone whose time it is, and which would live longer by it.

    Returns:
        The fresh certificates.

    Raises:
        ClusterError: the folder cannot be written.
        ConfigError: the authority cannot be used, or a certificate cannot be read.
    """
    with _alone(folder):
        wanted = [each for each in members_validity(folder) if not only_due or each.is_due(now)]
        if not wanted:
            return []
        signs = Authority.read(authority / CA_FILE, authority / CA_KEY_FILE, now)
        ends = signs.certificate.not_valid_after_utc
        members = [Member(each.name) for each in wanted if not only_due or each.end < ends]
        try:
            issue(folder, signs, members, now)
        except OSError as err:
            raise ClusterError(f"cannot write into {folder}: {err.strerror}; certificates are renewed there") from err
        return [_validity(member.value, certificate_path(folder, member)) for member in members]


def look_after(secrets: SecretFiles, now: datetime) -> list[str]:
    """Renew the certificates that are due, where their authority's key is at hand.

    Returns:
        What is left to somebody else, a line for each certificate.
    """
    folder = Path(secrets.folder)
    try:
        if (folder / CA_KEY_FILE).exists():
            for fresh in renew(folder, folder, now, only_due=True):
                logger.info("certificate.renewed path=%s until=%s", fresh.path, fresh.end.isoformat())
        authority = authority_validity(folder)
        left = [each for each in members_validity(folder) if each.is_due(now) and each.end < authority.end]
        others = [authority]
        if secrets.own_certificate is not None:
            others.append(own_validity(Path(secrets.own_certificate.certificate)))
        left += [each for each in others if each.end - now < _NOTICE]
    except (ClusterError, ConfigError) as err:
        return [str(err)]
    return [f"{each.path} expires on {each.end:%Y-%m-%d}; {_WAYS_OUT.get(each.name, _ROTATE)}" for each in left]


async def keep_looking_after(secrets: SecretFiles, now: Callable[[], datetime] = utc_now) -> None:
    """Look after the certificates now and every hour, until cancelled; what is left to others goes to the log."""
    while secrets.has_tls:
        for complaint in await asyncio.to_thread(look_after, secrets, now()):
            logger.warning("certificate.due %s", complaint)
        await asyncio.sleep(_LOOK_INTERVAL_S)


_ROTATE = "its authority's key is not here: `colm certificates rotate --from DIR`"
_WAYS_OUT = {
    "authority": "a cluster has a new one after `colm down` and `colm up`, or with a new folder of `colm secrets`",
    "own": "renew it: it is read again when it changes",
}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: all nodes of a machine look after the same folder."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise ClusterError(f"cannot read {folder}: {err.strerror}; it must be the folder of `colm secrets`") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
