"""The certificates of a cluster's members: which there are, until when, and fresh ones in their place."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from cluster.security.secret_files import SecretFiles
from cluster.security.trust import (
    CA_KEY_FILE,
    alone,
    copy_trust,
    end_overlap,
    issue,
    read_authority,
    read_overlap,
    unwritable,
)
from colm.clock import utc_now
from colm.errors import ClusterError, ConfigError
from colm.wire.certificates import read_certificates, signer_of
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
    """From when until when a certificate is valid, and who says so."""

    name: str
    """Whose it is: a member's word, or another."""
    path: Path
    begin: datetime
    end: datetime
    signed_by: str
    """The authority's name, and its key's id."""
    serial: int

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


def authorities_validity(folder: Path) -> list[Validity]:
    """The authorities that a folder trusts, the one that signs first; one that gives way to it ends with the overlap.

    Raises:
        ConfigError: it has none, or one cannot be read.
    """
    path, overlap = folder / CA_FILE, read_overlap(folder)
    first, *others = read_certificates(path)
    found = [_of("authority", path, first)]
    for each in others:
        old = _of("old authority" if overlap else "authority", path, each)
        found.append(old if overlap is None else replace(old, end=min(old.end, overlap.not_valid_after_utc)))
    return found


def own_validity(certificate: Path) -> Validity:
    """The certificate that the gateway's operator has from elsewhere.

    Raises:
        ConfigError: it has none, or cannot be read.
    """
    return _validity("own", certificate)


def _validity(name: str, path: Path) -> Validity:
    return _of(name, path, read_certificates(path)[0])


def _of(name: str, path: Path, certificate: x509.Certificate) -> Validity:
    return Validity(
        name=name,
        path=path,
        begin=certificate.not_valid_before_utc,
        end=certificate.not_valid_after_utc,
        signed_by=signer_of(certificate),
        serial=certificate.serial_number,
    )


def renew(folder: Path, authority: Path, now: datetime, *, only_due: bool) -> list[Validity]:
    """Give the members of a folder fresh keys and certificates. Nodes that run use them from the next connection on.

    Args:
        folder: of the certificates.
        authority: folder with the authority and its key: the same one, or the first machine's, whose trust is copied.
        now: the time.
        only_due: those alone whose time it is, and which would live longer by it; and those by another authority.

    Returns:
        The fresh certificates.

    Raises:
        ClusterError: the folder cannot be written.
        ConfigError: the authority cannot be used, or a certificate cannot be read.
    """
    with alone(folder), nullcontext() if authority == folder else alone(authority):
        signs = read_authority(authority, now)
        ends = signs.certificate.not_valid_after_utc

        def is_wanted(each: Validity) -> bool:
            return not only_due or (each.is_due(now) and each.end < ends) or each.signed_by != signs.name

        members = [Member(each.name) for each in members_validity(folder) if is_wanted(each)]
        try:
            if authority != folder:
                copy_trust(folder, authority)
            issue(folder, signs, members, now)
        except OSError as err:
            raise unwritable(folder, err) from err
        return [_validity(member.value, certificate_path(folder, member)) for member in members]


def look_after(secrets: SecretFiles, now: datetime) -> list[str]:
    """Renew the certificates that are due, where their authority's key is at hand, and end an overlap that is over.

    Returns:
        What is left to somebody else, a line for each certificate.
    """
    folder = Path(secrets.folder)
    try:
        if end_overlap(folder, now):
            logger.info("certificate.old_authority_ended folder=%s", folder)
        if (folder / CA_KEY_FILE).exists():
            for fresh in renew(folder, folder, now, only_due=True):
                logger.info("certificate.renewed path=%s until=%s", fresh.path, fresh.end.isoformat())
        authority = authorities_validity(folder)[0]
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
    "authority": "`colm certificates rotate --authority` makes another; your own one is `colm down` and `colm up`",
    "own": "renew it: it is read again when it changes",
}
